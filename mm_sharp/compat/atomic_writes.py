"""Checkpoints that are on the disk as a whole or not at all (ours).

Cause: MMEngine writes a checkpoint straight into the file that it is to be, and with ``max_keep_ckpts`` or
``save_best`` removes an old one before it writes the new one. A run that is killed in between, or whose disk is full,
is left with a torn file and, with ``max_keep_ckpts=1``, with no other.

Repair, in runs that use this package: what their runner and their ``CheckpointHook`` write goes into a file beside it
first (``.epoch_3.pth.1234.partial``, with the number of the process), is flushed to the disk and then renamed, which
happens as a whole or not at all; so does ``last_checkpoint``, which names the newest. What they remove is removed after
all of that. The disk needs room for one checkpoint more than ``max_keep_ckpts``. Files of this machine only: other
storage backends have their own ways.

Ends with: an mmengine that does so (none as of 0.10.7).
"""

from __future__ import annotations

import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook, checkpoint_hook
from mmengine.runner import FlexibleRunner, Runner

from .fix import Fix

_NAME = 'whole files'
_ENDS = 'an mmengine that writes a checkpoint before it removes another (none as of 0.10.7)'
_PARTIAL = '.partial'
_HOOK_METHODS = ('_save_checkpoint_with_step', '_save_best_checkpoint', '_publish_model')
_active: list[bool] = []


class CheckpointWriteError(OSError):
    """A file could not be written; what was there under its name before is untouched."""


class WholeFilesHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Marks the runs whose checkpoints are written as a whole, and clears away what a killed run left half written."""

    priority = 'LOWEST'  # after CheckpointHook, which learns its folder in before_train

    def before_train(self, runner: Any) -> None:
        """Remove left-over files."""
        if is_main_process():
            folders = {getattr(hook, 'out_dir', None) for hook in runner.hooks if isinstance(hook, CheckpointHook)}
            for folder in {runner.work_dir, *folders} - {None}:
                remove_left_overs(folder)


def install() -> None:
    """Wrap what saves checkpoints in MMEngine's runners and ``CheckpointHook``; a second call changes nothing."""
    for runner_class in (Runner, FlexibleRunner):
        if not _is_wrapped(runner_class.save_checkpoint):
            runner_class.save_checkpoint = _whole_save(runner_class.save_checkpoint)
    for name in _HOOK_METHODS:
        method = getattr(CheckpointHook, name, None)
        if method is not None and not _is_wrapped(method):
            setattr(CheckpointHook, name, _whole_hook_method(method))


def describe() -> Fix:
    """Always active, for runs that use this package."""
    reason = 'runs that use mm_sharp write a checkpoint as a whole before they remove an old one'
    return Fix(_NAME, _is_wrapped(Runner.save_checkpoint), reason, _ENDS)


def remove_left_overs(folder: str | Path) -> None:
    """Remove what a killed run left half written in a folder, and in the folders of checkpoints that are in it."""
    for pattern in (f'.*{_PARTIAL}', f'*/.*{_PARTIAL}'):
        for file in Path(folder).glob(pattern):
            file.unlink(missing_ok=True)


def write_whole(content: bytes, path: str | Path) -> None:
    """Write a file so that at any time it is there as before or with all of ``content``.

    Raises:
        CheckpointWriteError: It could not be written. It is as before, and nothing else is left.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    partial = target.with_name(f'.{target.name}.{os.getpid()}{_PARTIAL}')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointWriteError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    _flush_folder(target.parent)


@contextmanager
def atomic_writes() -> Iterator[None]:
    """Within, MMEngine's local files are written as a whole; at the end, what was to be removed is.

    If an exception passes through, nothing is removed.
    """
    if _active:
        yield
        return
    removals: list[Callable[[], None]] = []
    _active.append(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_replaced(LocalBackend, 'put', lambda _, obj, filepath: write_whole(obj, filepath)))
            for name in ('remove', 'rmtree'):
                stack.enter_context(_replaced(LocalBackend, name, lambda _, path: removals.append(_removal(path))))
            # CheckpointHook opens last_checkpoint itself.
            stack.enter_context(_replaced(checkpoint_hook, 'open', _open_whole))
            yield
    finally:
        _active.clear()
    for remove in removals:
        remove()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    had, original = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def _open_whole(path: str, mode: str = 'r', **kwargs: Any) -> Iterator[Any]:
    if mode != 'w':
        with open(path, mode, **kwargs) as stream:
            yield stream
        return
    text = io.StringIO()
    yield text
    write_whole(text.getvalue().encode(), path)


def _removal(path: str | Path) -> Callable[[], None]:
    """Removes what has a name now; not what may be written under it until then."""
    identity = _identity(path)

    def remove() -> None:
        if identity is None or _identity(path) != identity:
            return
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    return remove


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _flush_folder(folder: Path) -> None:
    """Have the disk know of a renaming; some systems cannot open a folder, and do without."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _whole_save(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(self):
            return save(self, *args, **kwargs)
        with atomic_writes():
            save(self, *args, **kwargs)
        # Of sharded weights every rank writes a file: all must be there before the checkpoint is called the newest.
        holds_all = getattr(getattr(self, 'strategy', None), '_is_full_state_dict', None)
        if holds_all is not None and not holds_all():
            barrier()
        return None

    wrapper._whole = True  # type: ignore[attr-defined]
    return wrapper


def _whole_hook_method(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def wrapper(self: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(runner):
            return method(self, runner, *args, **kwargs)
        with atomic_writes():
            return method(self, runner, *args, **kwargs)

    wrapper._whole = True  # type: ignore[attr-defined]
    return wrapper


def _is_wrapped(function: Any) -> bool:
    return hasattr(function, '_whole')


def _is_ours(runner: Any) -> bool:
    return any(isinstance(hook, WholeFilesHook) for hook in runner.hooks)
