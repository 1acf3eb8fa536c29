"""Sharpness-aware training for OpenMMLab: SAM and ASAM as MMEngine optimizer wrappers.

Importing the package registers, in MMEngine's root registries:

- ``OPTIM_WRAPPERS``: :class:`SAMOptimWrapper`
- ``HOOKS``: :class:`SharpnessHook`, :class:`mm_sharp.compat.PlainCheckpointHook`

and lets :mod:`mm_sharp.compat` mend what is broken on the installed stack. Nothing else happens at import.
"""

from importlib import util as _util

if _util.find_spec('mm_sharp.compat') is not None:
    from mm_sharp import compat as _compat

    getattr(_compat, 'apply', lambda: None)()

from mm_sharp.hooks import SharpnessHook
from mm_sharp.sam import SAMOptimWrapper

__version__ = '0.1.0'

__all__ = ['SAMOptimWrapper', 'SharpnessHook', '__version__']
