"""Sharpness-aware training for OpenMMLab: SAM and ASAM as MMEngine optimizer wrappers.

Importing the package registers, in MMEngine's root registries:

- ``OPTIM_WRAPPERS``: :class:`SAMOptimWrapper`
- ``HOOKS``: :class:`SharpnessHook`, :class:`mm_sharp.compat.PlainCheckpointHook`

and lets :mod:`mm_sharp.compat` mend what is broken on the installed stack. Nothing else happens at import.
"""

import sys as _sys

__version__ = '0.1.0'
__all__ = ['SAMOptimWrapper', 'SharpnessHook', '__version__']

# The doctor must run where torch or MMEngine is missing or broken: it imports what it can by itself.
if 'mm_sharp.doctor' not in _sys.orig_argv:
    from mm_sharp import compat as _compat

    _compat.apply()

    from mm_sharp.hooks import SharpnessHook
    from mm_sharp.sam import SAMOptimWrapper
