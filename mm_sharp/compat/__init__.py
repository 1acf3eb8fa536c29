"""What is broken on today's stack, and how it is patched.

``apply`` runs when ``mm_sharp`` is imported. A fix patches only what is missing or broken, never a working install;
none changes how a config behaves that doesn't use this package. A file's docstring names the cause and what is done,
its :class:`Fix`, when that runs and which version makes it unnecessary.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress

from . import yapf_grammar  # installs itself: what comes next imports MMEngine, and that imports yapf

# isort: split
from . import atomic_writes, checkpoint_hook, config_names, flexible_runner, mmpose_imports
from .atomic_writes import CheckpointWriteError as CheckpointWriteError
from .checkpoint_hook import PlainCheckpointHook as PlainCheckpointHook
from .checkpoint_hook import enable_for_all_runs as enable_for_all_runs
from .checkpoint_hook import is_ours as is_ours
from .checkpoint_hook import register_default_hook as register_default_hook
from .checkpoint_hook import uses_mm_sharp as uses_mm_sharp
from .fix import Fix as Fix
from .mmpose_imports import MissingOperatorError as MissingOperatorError
from .plain_checkpoint import explain_load_error as explain_load_error
from .plain_checkpoint import only_weights as only_weights
from .plain_checkpoint import trust_checkpoints as trust_checkpoints

_FIXES = (
    *(yapf_grammar.fix_grammars, mmpose_imports.fix_torchvision, mmpose_imports.fix_mmcv),
    *(mmpose_imports.fix_xtcocotools, mmpose_imports.fix_bfloat16, mmpose_imports.fix_canvas),
    *(config_names.fix_lookup, config_names.fix_scope),
    *(checkpoint_hook.fix_checkpoints, atomic_writes.fix_writes, flexible_runner.fix_resume),
)


def apply() -> None:
    """Install all fixes. Cheap, and a second call changes nothing."""
    for fix in _FIXES:
        fix.install()


def fixes() -> list[Fix]:
    """The state of every fix, once what it waits for was imported: only then it shows whether it is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in (name for fix in _FIXES for name in fix.before):
            with suppress(Exception):  # whatever is wrong with it, the doctor's own check says it
                importlib.import_module(name)
    return list(_FIXES)
