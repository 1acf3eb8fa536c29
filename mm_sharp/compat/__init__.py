"""What is broken on today's stack, and how it is patched.

``apply`` runs when ``mm_sharp`` is imported. A fix patches only what is missing or broken, never a working install;
none changes how a config behaves that doesn't use this package. Each lies in a file of its own: the docstring names the
cause, ``FIX`` how it is recognised, what is done, and the version that makes it unnecessary.
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

_FIXES = tuple(
    module.FIX
    for module in (
        *(yapf_grammar, torchvision_ops, mmcv_ops, xtcocotools_names, matplotlib_canvas, bfloat16_arrays),
        *(package_lookup, config_scope, checkpoint_hook, atomic_writes, flexible_runner),
    )
)  # fmt: skip


def apply() -> None:
    """Install all fixes. Cheap, and a second call changes nothing."""
    for fix in _FIXES:
        fix.install()


def fixes() -> list[Fix]:
    """The state of every fix, for ``python -m mm_sharp.doctor``.

    Imports what they wait for: only then it shows whether they are needed. What doesn't import even so is left to the
    doctor to report.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in (name for fix in _FIXES for name in fix.before):
            try:
                importlib.import_module(name)
            except Exception:  # whatever is wrong with it, the doctor's own check says it
                continue
    return list(_FIXES)
