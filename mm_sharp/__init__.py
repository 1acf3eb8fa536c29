"""Sharpness-aware training for OpenMMLab: SAM, its family and AUSAM as MMEngine optimizer wrappers.

Importing the package registers the optimizer wrappers, hooks, batch sampler and data set in MMEngine's root registries,
lets :mod:`mm_sharp.compat` patch what is broken on the installed stack, and :mod:`mm_sharp.config.fragments` put the
fragments that a config file inherits into effect when it is read. Nothing else happens at import.
"""

import sys as _sys
from pathlib import Path as _Path

__version__ = '0.2.0'
__all__ = [
    'AUSAMOptimWrapper',
    'AUSAMSampler',
    'ESAMOptimWrapper',
    'FriendlySAMOptimWrapper',
    'GSAMOptimWrapper',
    'IndexedDataset',
    'LookSAMOptimWrapper',
    'MSAMOptimWrapper',
    'SAMOptimWrapper',
    'SharpnessHook',
    'WSAMOptimWrapper',
    '__version__',
]

# The command only starts other programs. The doctor must run where torch or MMEngine is missing or broken: it imports
# what it can by itself. (While Python looks for the module after `-m`, `sys.argv` begins with `-m`.)
_program = _Path(_sys.argv[0]).stem
_is_light = _program == 'mm-sharp' or (
    _program == '-m' and not {'mm_sharp', 'mm_sharp.doctor'}.isdisjoint(_sys.orig_argv)
)
if not _is_light:
    from mm_sharp import compat as _compat
    from mm_sharp import moved as _moved
    from mm_sharp.config import fragments as _fragments

    _compat.apply()
    _fragments.install()
    _moved.install()

    from mm_sharp.config import preflight as _preflight
    from mm_sharp.hooks.checkpoint import CheckpointCheckHook as _CheckpointCheckHook
    from mm_sharp.hooks.compile import CompileHook as _CompileHook
    from mm_sharp.hooks.history import SampleHistoryHook as _SampleHistoryHook
    from mm_sharp.hooks.resumed_draws import ResumedDrawsHook as _ResumedDrawsHook
    from mm_sharp.hooks.sharpness import SharpnessHook
    from mm_sharp.hooks.start import StartHook as _StartHook
    from mm_sharp.methods.ausam import AUSAMOptimWrapper
    from mm_sharp.methods.esam import ESAMOptimWrapper
    from mm_sharp.methods.friendlysam import FriendlySAMOptimWrapper
    from mm_sharp.methods.gsam import GSAMOptimWrapper
    from mm_sharp.methods.looksam import LookSAMOptimWrapper
    from mm_sharp.methods.msam import MSAMOptimWrapper
    from mm_sharp.methods.sam import SAMOptimWrapper
    from mm_sharp.methods.wsam import WSAMOptimWrapper
    from mm_sharp.samples.ausam_sampler import AUSAMSampler
    from mm_sharp.samples.indexed_dataset import IndexedDataset

    _preflight.install()
    _compat.register_default_hook(_SampleHistoryHook)
    _compat.register_default_hook(_ResumedDrawsHook)
    _compat.register_default_hook(_CompileHook)
    _compat.register_default_hook(_StartHook)
    _compat.register_default_hook(_CheckpointCheckHook, of_tools=True)
