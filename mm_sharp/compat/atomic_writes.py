"""Checkpoints that are on the disk as a whole or not at all.

MMEngine removes an old checkpoint before it writes the new one straight to its name: a killed run, or a full disk,
leaves a torn file, and perhaps no other. In runs that use this package, what their runner and ``CheckpointHook`` write
on this machine goes into a file beside it (``.epoch_3.pth.<process>.partial``), is flushed to the disk and renamed;
what they remove is removed after that. The disk needs room for one checkpoint more than ``max_keep_ckpts``.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook, checkpoint_hook
from mmengine.runner import FlexibleRunner, Runner

from .fix import Fix

_METHODS = (
    *((kind, 'save_checkpoint') for kind in (Runner, FlexibleRunner)),
    *((CheckpointHook, name) for name in ('_save_checkpoint_with_step', '_save_best_checkpoint', '_publish_model')),
)
_LEFT_OVER = '.*.[0-9]*.partial'  # with the number of a process: other programs have names like these, too
_active = False


class CheckpointWriteError(OSError):
    """A file could not be written; what was there under its name before is untouched."""


class AtomicWritesHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Marks the runs whose checkpoints are written as a whole, and removes what a killed run left half written."""

    priority = 'LOWEST'  # after CheckpointHook, which learns its folder in before_train

    def before_train(self, runner: Any) -> None:
        """Remove left-over files, also in the folders that checkpoints of sharded weights are."""
        folders = {getattr(hook, 'out_dir', None) for hook in runner.hooks if isinstance(hook, CheckpointHook)}
        for folder in map(Path, {runner.work_dir, *folders} - {None} if is_main_process() else ()):
            for file in (*folder.glob(_LEFT_OVER), *folder.glob(f'*/{_LEFT_OVER}')):
                file.unlink(missing_ok=True)


def write_atomically(content: bytes, path: str | Path) -> None:
    """Write a file so that it is there as before, as after a CheckpointWriteError, or with all of ``content``."""
    target = Path(os.path.realpath(path))  # a link stays one
    partial = target.with_name(f'.{target.name}.{os.getpid()}.partial')
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
    with suppress(OSError):  # some systems cannot open a folder, and do without
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # on the disk, too, the renaming comes before a removal
        finally:
            os.close(folder)


@contextmanager
def atomic_writes() -> Iterator[None]:
    """Within, MMEngine's local files are written as a whole; what was to be removed is at the end, if all went well."""
    global _active
    if _active:  # a hook's method that calls another one, or the runner's
        yield
        return
    removed: set[str] = set()

    def put(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
        write_atomically(obj, filepath)
        removed.difference_update((str(filepath), os.path.dirname(filepath)))  # what has that name now is new

    def remove(self: LocalBackend, path: str | Path) -> None:
        removed.add(str(path))

    opens = patch.object(checkpoint_hook, 'open', _open_atomically, create=True)
    with patch.multiple(LocalBackend, put=put, remove=remove, rmtree=remove), opens:
        _active = True
        try:
            yield
        finally:
            _active = False
    for path in removed:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


@contextmanager
def _open_atomically(path: str, mode: str) -> Iterator[io.StringIO]:
    """In place of the ``open`` by which CheckpointHook writes ``last_checkpoint``."""
    text = io.StringIO()
    yield text
    write_atomically(text.getvalue().encode(), path)


def _atomic(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        runner = args[0] if isinstance(self, CheckpointHook) else self
        if not any(isinstance(hook, AtomicWritesHook) for hook in runner.hooks):
            return method(self, *args, **kwargs)
        with atomic_writes():
            method(self, *args, **kwargs)
            # Of sharded weights every rank writes a file: all must be there before the checkpoint is called the newest.
            holds_all = getattr(getattr(self, 'strategy', None), '_is_full_state_dict', None)
            if holds_all is not None and not holds_all():
                barrier()
        return None

    return wrapper


@partial(Fix, 'atomic writes', 'an mmengine that writes a checkpoint before it removes another (none as of 0.10.7)')
def fix_writes(module: str) -> str:
    for kind, name in _METHODS:
        if hasattr(kind, name):
            setattr(kind, name, _atomic(getattr(kind, name)))
    return 'runs that use mm_sharp write a checkpoint as a whole before they remove an old one'
