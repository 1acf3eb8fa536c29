"""What is broken on today's stack, and how it is mended.

``apply`` runs when ``mm_sharp`` is imported. A fix is active only where the real thing is missing or broken,
never over a working install; none changes how a config behaves that doesn't use this package. Each lives in
a file of its own, whose docstring names the cause, the repair and the version that makes it unnecessary:

=====================  ======================================================================================
``yapf_grammar``       processes that start together: ``import mmengine`` works in all of them
``torchvision_ops``    torchvision beside a CPU torch: ``import torchvision`` works
``mmcv_ops``           mmcv-lite: ``mmcv.ops`` imports, a missing operator raises when it is called
``xtcocotools_names``  xtcocotools missing or built for another numpy: faster-coco-eval stands in
``matplotlib_canvas``  matplotlib from 3.10 on: MMPose's 3-D visualizer draws
``bfloat16_arrays``    MMPose's heads log their accuracy under bfloat16 autocast
``package_lookup``     no ``pkg_resources``: MMEngine finds installed packages without it
``config_scope``       ``mm_sharp::…`` in configs
``checkpoint_hook``    checkpoints that load with ``torch.load(weights_only=True)``
``atomic_writes``        checkpoints that are written as a whole, before old ones are removed
``fsdp_strategy``      runs under MMEngine's FSDPStrategy can be resumed
``flexible_runner``    and so can those of its FlexibleRunner, at the right epoch
=====================  ======================================================================================

The first six wait for the import of what they repair (``import_hook``): importing mm_sharp must not import
MMPose, MMCV, torchvision or matplotlib, and must work without them. The others concern MMEngine, which we need
anyway, and are installed at once; ``yapf_grammar`` before any of them imports it.
"""

from __future__ import annotations

import importlib
import warnings

from . import yapf_grammar  # installs itself: what comes next imports MMEngine, and that imports yapf

# isort: split
from . import (
    atomic_writes,
    bfloat16_arrays,
    checkpoint_hook,
    config_scope,
    flexible_runner,
    fsdp_strategy,
    matplotlib_canvas,
    mmcv_ops,
    package_lookup,
    torchvision_ops,
    xtcocotools_names,
)
from .atomic_writes import CheckpointWriteError
from .checkpoint_hook import PlainCheckpointHook, enable_for_all_runs, register_default_hook
from .fix import Fix
from .mmcv_ops import MissingOperatorError
from .trust import explain_load_error, only_weights, trust_checkpoints

__all__ = [
    'CheckpointWriteError',
    'Fix',
    'MissingOperatorError',
    'PlainCheckpointHook',
    'apply',
    'enable_for_all_runs',
    'explain_load_error',
    'fixes',
    'only_weights',
    'register_default_hook',
    'trust_checkpoints',
]

_FIXES = (
    *(yapf_grammar, torchvision_ops, mmcv_ops, xtcocotools_names, matplotlib_canvas, bfloat16_arrays),
    *(package_lookup, config_scope, checkpoint_hook, atomic_writes, fsdp_strategy, flexible_runner),
)  # fmt: skip
_REPAIRED_AT_IMPORT = ('torchvision', 'mmcv.ops', 'xtcocotools.mask', 'mmpose.visualization', 'mmpose.models')


def apply() -> None:
    """Install all fixes. Cheap, and a second call changes nothing."""
    for fix in _FIXES:
        fix.install()


def fixes() -> list[Fix]:
    """The state of every fix, for ``python -m mm_sharp.doctor``.

    Imports what is repaired at import, since only then it shows whether a repair is needed; what doesn't
    import even so is left to the doctor to report.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in _REPAIRED_AT_IMPORT:
            try:
                importlib.import_module(name)
            except Exception:  # whatever is wrong with it, the doctor's own check says it
                continue
    return [fix.describe() for fix in _FIXES]
