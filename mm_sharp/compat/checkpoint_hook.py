"""Checkpoints in plain types, in runs that use this package (why and how: ``plain_checkpoint``).

A hook rewrites checkpoints when a Runner saves and loads them. It is added to every Runner that uses this package, and
to no other, in MMPose's own ``tools/train.py``, too: that shows when a Runner is built, so its ``register_hooks`` is
wrapped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, Registry
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner

from .atomic_writes import AtomicWritesHook
from .fix import Fix
from .plain_checkpoint import arrays_as_lists, from_plain, to_plain

# In ``checkpoint['meta']``, the data set's description twice: programs without this package, as MMPose's inference,
# read the first as it is in the file; by the second, where arrays are not lists, a resumed run compares its data set.
_DESCRIPTION, _EXACT = 'dataset_meta', 'mm_sharp_dataset_meta'
_OUR_PACKAGE = __name__.partition('.')[0]
_in_every_run = False
_default_hooks: dict[type[Hook], bool] = {AtomicWritesHook: True}


@HOOKS.register_module()
class PlainCheckpointHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Save checkpoints in plain types and rebuild MMEngine's objects when one is loaded.

    Added by itself to runs that use mm_sharp; in any other config, add
    ``custom_hooks=[dict(type='PlainCheckpointHook')]``. Checkpoints that were saved without it load unchanged. One
    saved with it can be tested without it, too; resuming without it starts an empty log.
    """

    # Saving: after all hooks that add to the checkpoint. Loading: RestoreCheckpointHook goes first.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._told: set[str] = set()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Rewrite every entry of ``checkpoint``; warn once of each type that has no plain form."""
        meta = checkpoint.get('meta')
        if isinstance(meta, dict) and _DESCRIPTION in meta:
            lists = arrays_as_lists(meta[_DESCRIPTION])
            checkpoint['meta'] = {**meta, _DESCRIPTION: lists, _EXACT: meta[_DESCRIPTION]}
        for key in list(checkpoint):
            left: list[str] = []
            checkpoint[key] = to_plain(checkpoint[key], left)
            for line in sorted({f'checkpoint[{key!r}] holds a {kind}, which' for kind in left} - self._told):
                self._told.add(line)
                way = 'not load with torch.load(weights_only=True), but only with --trust-checkpoint'
                text = f'{line} has no plain form and is saved as it is: this checkpoint will {way}'
                print_log(text, logger='current', level=logging.WARNING)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Rebuild what ``before_save_checkpoint`` rewrote."""
        meta = checkpoint.get('meta')
        if isinstance(meta, dict) and _EXACT in meta:
            meta[_DESCRIPTION] = meta.pop(_EXACT)
        for key in list(checkpoint):
            checkpoint[key] = from_plain(checkpoint[key])


class RestoreCheckpointHook(PlainCheckpointHook):
    """Rebuilds a checkpoint before other hooks read it: what is done last when saving must be undone first."""

    priority = 'HIGHEST'

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Nothing: other hooks have not added theirs yet."""


def enable_for_all_runs() -> None:
    """From now on, checkpoints of every Runner of this process are saved and checked as those of our runs are."""
    global _in_every_run
    _in_every_run = True


def register_default_hook(hook: type[Hook], of_tools: bool = False) -> None:
    """Have a hook added to every Runner that uses mm_sharp (``of_tools``: or is a tool's) and has none of it yet."""
    _default_hooks.setdefault(hook, of_tools)


def uses_mm_sharp(runner: Any) -> bool:
    """Whether a Runner, its hooks registered, has an optimizer wrapper or a hook of this package, or of a subclass."""
    return any(map(is_ours, [*runner.hooks, runner.optim_wrapper]))


def is_ours(value: Any) -> bool:
    """Whether a config, an object, a class, a registered name, or anything in a dict of these is of this package."""
    if isinstance(value, (Mapping, OptimWrapperDict)):
        return any(is_ours(item) for _, item in value.items())
    if isinstance(value, str):
        return any(map(is_ours, _classes_named(value.rpartition('.')[2], OPTIM_WRAPPERS)))
    kind = value if isinstance(value, type) else type(value)
    return any(base.__module__.partition('.')[0] == _OUR_PACKAGE for base in kind.__mro__)


def _classes_named(name: str, registry: Registry) -> Iterator[type]:
    """Classes registered as ``name`` here or in a child; unlike ``Registry.get``, this imports nothing."""
    found = registry._module_dict.get(name)
    if isinstance(found, type):
        yield found
    for child in registry._children.values():
        yield from _classes_named(name, child)


def _with_default_hooks(register_hooks: Callable[..., None]) -> Callable[..., None]:
    @wraps(register_hooks)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        register_hooks(self, *args, **kwargs)
        ours = uses_mm_sharp(self)
        if not (_in_every_run or ours):
            return
        kinds = [kind for kind, of_tools in _default_hooks.items() if ours or of_tools]
        for kind in [*kinds, PlainCheckpointHook, RestoreCheckpointHook]:
            if not any(isinstance(hook, kind) for hook in self.hooks):
                self.register_hook(kind())

    return wrapper


def _with_dataset_meta(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoints from before lists were written in the first description need it in programs without a Runner."""

    @wraps(load_checkpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        checkpoint = load_checkpoint(*args, **kwargs)
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        if isinstance(meta, dict) and _DESCRIPTION in meta:
            meta[_DESCRIPTION] = from_plain(meta[_DESCRIPTION])
        return checkpoint

    return wrapper


@partial(Fix, 'plain checkpoints', 'an mmengine that saves plain checkpoints (none as of 0.10.7)')
def fix_checkpoints(module: str) -> str:
    for runner_class in (Runner, FlexibleRunner):
        runner_class.register_hooks = _with_default_hooks(runner_class.register_hooks)
    CheckpointLoader.load_checkpoint = classmethod(_with_dataset_meta(CheckpointLoader.load_checkpoint.__func__))
    return 'runs that use mm_sharp save checkpoints in plain types, which torch.load(weights_only=True) accepts'
