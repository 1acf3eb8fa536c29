"""Modules by their names of before version 0.2, for one release: each says its new name when it is imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_NAMES = {
    'ascent': 'step.ascent',
    'ausam': 'methods.ausam',
    'ausam_sampler': 'samples.ausam_sampler',
    'batch_draw': 'samples.draw',
    'benchmark': 'analysis.benchmark',
    'build_errors': 'config.build_errors',
    'call_inputs': 'ops.call_inputs',
    'careful_loading': 'cli.loading',
    'checkpoint_check': 'hooks.checkpoint',
    'compilation': 'hooks.compile',
    'config_types': 'config.fragments',
    'dataset_keys': 'samples.dataset_keys',
    'diagnosis': 'doctor',
    'draws': 'samples.seeds',
    'endings': 'cli.process',
    'esam': 'methods.esam',
    'finite': 'ops.finite',
    'forward_state': 'ops.forward_state',
    'fragments': 'config.fragments',
    'grad_switch': 'ops.frozen_params',
    'gradients': 'ops.gradients',
    'history_hook': 'hooks.history',
    'indexed_dataset': 'samples.indexed_dataset',
    'launcher_watch': 'cli.process',
    'loader_draws': 'samples.draw',
    'members': 'step.optim_wrappers',
    'method': 'step.method',
    'module_state': 'ops.module_state',
    'parallel_model': 'step.parallel',
    'parameters': 'ops.parameters',
    'per_sample_pass': 'methods.per_sample',
    'perturbation': 'ops.perturbation',
    'precision': 'ops.precision',
    'preflight': 'config.preflight',
    'quantized_config': 'config.fragments',
    'quantized_perturbation': 'ops.quantized_perturbation',
    'random_state': 'ops.rng',
    'ranks': 'ops.all_reduce',
    'rare_changes': 'ops.rare_changes',
    'replay': 'ops.model_call',
    'resumed_draws': 'hooks.resumed_draws',
    'runners': 'cli.runners',
    'sam': 'methods.sam',
    'sample_history': 'samples.history',
    'sample_keys': 'samples.keys',
    'sample_table': 'samples.table',
    'sampling': 'samples.selection',
    'second_pass': 'step.second_pass',
    'shards': 'ops.fsdp',
    'sharpness': 'analysis.sharpness',
    'step_guard': 'step.nonfinite_guard',
    'step_record': 'step.timing',
    'step_watch': 'step.nonfinite_log',
    'study': 'analysis.study',
    'subset': 'samples.subset',
    'support': 'step.checks',
    'training_checks': 'config.preflight',
    'transfer': 'ops.host_copy',
    'two_pass': 'step.wrapper',
    'validation': 'errors',
    'visits': 'samples.pending',
    'wrapper_checks': 'config.preflight',
    'wrapper_state': 'step.checkpoint',
}


class _Alias(Loader):
    """Hands out the module of the new name."""

    def __init__(self, new: str) -> None:
        self._module = importlib.import_module(new)
        self._spec = self._module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, and not a copy: classes that are registered must not be made twice."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing but to take back what importing writes to a module that has run already."""
        module.__spec__ = self._spec


class MovedModules(MetaPathFinder):
    """Finds ``mm_sharp.<old>`` and everything below it under the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        package, _, rest = fullname.partition('.')
        old, dot, below = rest.partition('.')
        if package != 'mm_sharp' or old not in NEW_NAMES:
            return None
        new = f'mm_sharp.{NEW_NAMES[old]}{dot}{below}'
        message = f'{fullname} has moved to {new}; the old name will be gone in the next release'
        warnings.warn(message, FutureWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias(new), is_package=True)


def install() -> None:
    """Have old names be found; before the finder of files, which would run submodules again."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
