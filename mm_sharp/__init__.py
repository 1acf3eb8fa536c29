"""Sharpness-aware training for OpenMMLab: SAM, ASAM, ESAM and AUSAM as MMEngine optimizer wrappers.

Importing the package registers, in MMEngine's root registries:

- ``OPTIM_WRAPPERS``: :class:`SAMOptimWrapper`, :class:`ESAMOptimWrapper`, :class:`AUSAMOptimWrapper`
- ``HOOKS``: :class:`SharpnessHook`, :class:`mm_sharp.history_hook.SampleHistoryHook`,
  :class:`mm_sharp.resumed_draws.ResumedDrawsHook`, :class:`mm_sharp.compilation.CompileHook`,
  :class:`mm_sharp.compat.PlainCheckpointHook`
- ``DATA_SAMPLERS``: :class:`AUSAMSampler`
- ``DATASETS``: :class:`IndexedDataset`

lets :mod:`mm_sharp.compat` mend what is broken on the installed stack, and :mod:`mm_sharp.fragments` put the fragments
that a config file inherits into effect when it is read. Nothing else happens at import.
"""

import sys as _sys

__version__ = '0.1.0'
__all__ = [
    'AUSAMOptimWrapper',
    'AUSAMSampler',
    'ESAMOptimWrapper',
    'IndexedDataset',
    'SAMOptimWrapper',
    'SharpnessHook',
    '__version__',
]

# The doctor must run where torch or MMEngine is missing or broken: it imports what it can by itself.
if 'mm_sharp.doctor' not in _sys.orig_argv:
    from mm_sharp import compat as _compat
    from mm_sharp import fragments as _fragments

    _compat.apply()
    _fragments.install()

    from mm_sharp.ausam import AUSAMOptimWrapper
    from mm_sharp.ausam_sampler import AUSAMSampler
    from mm_sharp.checkpoint_check import CheckpointCheckHook as _CheckpointCheckHook
    from mm_sharp.compilation import CompileHook as _CompileHook
    from mm_sharp.esam import ESAMOptimWrapper
    from mm_sharp.history_hook import SampleHistoryHook as _SampleHistoryHook
    from mm_sharp.hooks import SharpnessHook
    from mm_sharp.indexed_dataset import IndexedDataset
    from mm_sharp.resumed_draws import ResumedDrawsHook as _ResumedDrawsHook
    from mm_sharp.sam import SAMOptimWrapper

    _compat.add_to_our_runs(_SampleHistoryHook)
    _compat.add_to_our_runs(_ResumedDrawsHook)
    _compat.add_to_our_runs(_CompileHook)
    _compat.add_to_our_runs(_CheckpointCheckHook, of_tools=True)
