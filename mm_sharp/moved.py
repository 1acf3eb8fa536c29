"""Modules by their names of before version 0.2, for one release: each says its new name when it is imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# By folder, the names of before, with the new one where that is another.
_MOVED = {
    '': 'diagnosis:doctor validation:errors',
    'analysis': 'benchmark sharpness study',
    'cli': 'careful_loading:loading endings:process launcher_watch:process runners:process',
    'config': (
        'build_errors:preflight config_types:fragments fragments preflight quantized_config:fragments '
        'training_checks:preflight wrapper_checks:preflight'
    ),
    'hooks': 'checkpoint_check:checkpoint compilation:compile history_hook:history resumed_draws',
    'methods': 'ausam esam per_sample_pass:per_sample sam',
    'ops': (
        'call_inputs finite forward_state gradients module_state parameters '
        'perturbation precision quantized_perturbation random_state:rng rare_changes '
        'replay:model_call shards:fsdp transfer:host_copy'
    ),
    'samples': (
        'ausam_sampler batch_draw:draw dataset_keys draws:seeds indexed_dataset loader_draws:draw '
        'sample_history:history sample_keys:keys sample_table:table sampling:selection subset visits:history'
    ),
    'step': (
        'ascent members:optim_wrappers method parallel_model:parallel ranks:parallel second_pass '
        'step_guard:nonfinite_guard step_record:timing step_watch:nonfinite_log support:checks two_pass:wrapper '
        'wrapper_state:checkpoint'
    ),
}
NEW_NAMES = {
    item.partition(':')[0]: f'{folder}.{item.rpartition(":")[2]}'.lstrip('.')
    for folder, items in _MOVED.items()
    for item in items.split()
}


class MovedModules(MetaPathFinder, Loader):
    """Finds ``mm_sharp.<old>`` and everything below it under the new name, and hands out the module of that name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, rest = fullname.partition('.')
        old, dot, below = rest.partition('.')
        if package != 'mm_sharp' or old not in NEW_NAMES:
            return None
        new = f'mm_sharp.{NEW_NAMES[old]}{dot}{below}'
        message = f'{fullname} has moved to {new}; the old name will be gone in the next release'
        warnings.warn(message, FutureWarning, stacklevel=2)
        return ModuleSpec(fullname, self, loader_state=new, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        # The module itself, and not a copy: classes that are registered must not be made twice.
        module = importlib.import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It has run already: this takes back what importing has written to it.
        module.__spec__ = module.__spec__ and module.__spec__.loader_state


def install() -> None:
    """Have old names be found; before the finder of files, which would run submodules again."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
