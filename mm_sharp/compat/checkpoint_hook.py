"""Rewrite checkpoints while a Runner saves and loads them (ours; cause and format: ``plain_checkpoint``).

The hook is added by itself to every Runner that uses this package, and to no other: whether the config has
our ``optim_wrapper`` or one of our hooks shows only when a Runner is built, so ``Runner.register_hooks`` is
wrapped. That works in MMPose's own ``tools/train.py``, too, where nothing but ``custom_imports`` loads us.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, Registry
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner

from .atomic_writes import WholeFilesHook
from .fix import Fix
from .plain_checkpoint import (
    from_plain,
    join_dataset_meta,
    missing_statistics,
    split_dataset_meta,
    to_plain,
)

_NAME = 'plain checkpoints'
_ENDS = 'an mmengine that saves plain checkpoints (none as of 0.10.7)'
_PACKAGE = __name__.partition('.')[0]
_in_every_run = False
_run_hooks: dict[type[Hook], bool] = {}


@HOOKS.register_module()
class PlainCheckpointHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Save checkpoints in plain types and rebuild MMEngine's objects when one is loaded.

    Added by itself to runs that use mm_sharp; in the config of any other run, add
    ``custom_hooks = [dict(type='PlainCheckpointHook')]``.

    A checkpoint that was saved without this hook is loaded unchanged. One that was saved with it can be
    tested and its weights loaded without it, too; resuming without it starts an empty log.
    """

    # Saving: after all hooks that add to the checkpoint. Loading: RestoreCheckpointHook goes first.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._told: set[str] = set()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Rewrite every entry of ``checkpoint``; warn once of each object that has no plain form."""
        left: list[str] = []
        for key in list(checkpoint):
            checkpoint[key] = to_plain(checkpoint[key], f'checkpoint[{key!r}]', left)
        if 'meta' in checkpoint:
            checkpoint['meta'] = split_dataset_meta(checkpoint['meta'])
        for line in left:
            if line not in self._told:
                self._told.add(line)
                print_log(
                    f'{line} has no plain form and is saved as it is: this checkpoint will not load with '
                    'torch.load(weights_only=True), but only with --trust-checkpoint',
                    logger='current',
                    level=logging.WARNING,
                )

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Rebuild what ``before_save_checkpoint`` rewrote."""
        missing = missing_statistics(checkpoint.get('message_hub'))
        if missing:
            print_log(
                f'the log in this checkpoint used the statistics {sorted(missing)}, which are not registered: '
                'import the module that defines them, e.g. by custom_imports',
                logger='current',
                level=logging.WARNING,
            )
        if 'meta' in checkpoint:
            checkpoint['meta'] = join_dataset_meta(checkpoint['meta'])
        for key in list(checkpoint):
            checkpoint[key] = from_plain(checkpoint[key], f'checkpoint[{key!r}]')


class RestoreCheckpointHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Lets ``PlainCheckpointHook`` rebuild a checkpoint before other hooks read it.

    A hook has one priority, but what is done last when saving must be undone first when loading.
    """

    priority = 'HIGHEST'

    def __init__(self, hook: PlainCheckpointHook) -> None:
        self._hook = hook

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """As ``PlainCheckpointHook.after_load_checkpoint``, which then finds nothing left to do."""
        self._hook.after_load_checkpoint(runner, checkpoint)


def install() -> None:
    """Wrap ``register_hooks`` of MMEngine's runners and what loads checkpoints; a second call changes nothing."""
    for runner_class in (Runner, FlexibleRunner):
        if not hasattr(runner_class.register_hooks, '__wrapped__'):
            runner_class.register_hooks = _with_our_hook(runner_class.register_hooks)
    if not hasattr(CheckpointLoader.load_checkpoint, '__wrapped__'):
        CheckpointLoader.load_checkpoint = classmethod(_with_dataset_meta(CheckpointLoader.load_checkpoint.__func__))


def enable_for_all_runs() -> None:
    """From now on, the checkpoints of every Runner of this process are saved and checked as those of our runs are.

    For command lines: a run that ``tools/train.py`` started can then be resumed and tested by our tools, a comparison
    run with the base optimizer included.
    """
    global _in_every_run
    _in_every_run = True


def register_default_hook(hook: type[Hook], of_tools: bool = False) -> type[Hook]:
    """Have a hook, made without arguments, added to every Runner whose config uses mm_sharp.

    Args:
        hook: Its class; a Runner that has one already gets no second.
        of_tools: Also to those that :func:`enable_for_all_runs` is for.
    """
    _run_hooks.setdefault(hook, of_tools)
    return hook


def describe() -> Fix:
    """Always active, for runs that use this package."""
    reason = (
        'runs that use mm_sharp save checkpoints in plain types, which torch.load(weights_only=True), the '
        'default from torch 2.6 on, accepts'
    )
    return Fix(_NAME, hasattr(Runner.register_hooks, '__wrapped__'), reason, _ENDS)


def _with_our_hook(register_hooks: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(register_hooks)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        register_hooks(self, *args, **kwargs)
        ours = uses_mm_sharp(self)
        if not (_in_every_run or ours):
            return
        kinds: list[type[Hook]] = [WholeFilesHook, *(kind for kind, of_tools in _run_hooks.items() if ours or of_tools)]
        for kind in kinds:
            if not any(isinstance(hook, kind) for hook in self.hooks):
                self.register_hook(kind())
        hook = next((hook for hook in self.hooks if isinstance(hook, PlainCheckpointHook)), None)
        if hook is None:
            hook = PlainCheckpointHook()
            self.register_hook(hook)
        self.register_hook(RestoreCheckpointHook(hook))

    return wrapper


def _with_dataset_meta(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Rebuild ``meta['dataset_meta']`` for programs without a Runner, as MMPose's inference.

    Checkpoints that this package wrote before it wrote lists there need it.
    """

    @functools.wraps(load_checkpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        checkpoint = load_checkpoint(*args, **kwargs)
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        if isinstance(meta, dict) and 'dataset_meta' in meta:
            rebuilt = from_plain(join_dataset_meta(meta), "checkpoint['meta']")
            if rebuilt is not meta:
                checkpoint['meta'] = rebuilt
        return checkpoint

    return wrapper


def uses_mm_sharp(runner: Any) -> bool:
    """Whether a Runner has an optimizer wrapper or a hook of this package, or a subclass of one.

    Args:
        runner: a Runner whose hooks have been registered; its ``optim_wrapper`` may still be a config.
    """
    if any(_is_ours(type(hook)) for hook in runner.hooks):
        return True
    return any(_is_ours(wrapper) for wrapper in _wrapper_classes(runner.optim_wrapper))


def _wrapper_classes(wrapper: Any) -> Iterator[type]:
    """The classes that a config, an optimizer wrapper or a dict of several may refer to."""
    if isinstance(wrapper, OptimWrapperDict):
        wrapper = dict(wrapper.items())
    if isinstance(wrapper, Mapping):
        kind = wrapper.get('type')
        if isinstance(kind, str):
            yield from _classes_named(kind.rpartition('.')[2], OPTIM_WRAPPERS)
        elif isinstance(kind, type):
            yield kind
        for item in wrapper.values():  # several wrappers, by name
            yield from _wrapper_classes(item)
    elif not isinstance(wrapper, (str, type(None))):
        yield type(wrapper)


def _classes_named(name: str, registry: Registry) -> Iterator[type]:
    """Classes registered as ``name`` here or in a child; unlike ``Registry.get``, this imports nothing."""
    found = registry._module_dict.get(name)
    if isinstance(found, type):
        yield found
    for child in registry._children.values():
        yield from _classes_named(name, child)


def _is_ours(cls: type) -> bool:
    return any(base.__module__.partition('.')[0] == _PACKAGE for base in cls.__mro__)
