"""Checkpoints in the tools: nothing in a file is run, and whatever is wrong with one is an error of one line."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner

from mm_sharp.compat import explain_load_error, only_weights, trust_checkpoints
from mm_sharp.compat.plain_checkpoint import ALWAYS, is_set
from mm_sharp.errors import UsageError, UserError, in_folder


@contextmanager
def careful_loading(trust: bool) -> Iterator[None]:
    """Within, whoever loads a checkpoint: one that can run code needs ``trust``, and what is wrong is a UserError."""
    if trust and is_set(ALWAYS):
        raise UserError(f'--trust-checkpoint: {ALWAYS} is set, which forbids it; unset it, or leave the option out')
    with ExitStack() as stack:
        stack.enter_context(trust_checkpoints() if trust else only_weights())
        original = CheckpointLoader.__dict__['load_checkpoint']
        stack.callback(setattr, CheckpointLoader, 'load_checkpoint', original)
        CheckpointLoader.load_checkpoint = classmethod(_explained_load(original.__func__))
        for kind in (Runner, FlexibleRunner):
            stack.callback(setattr, kind, 'load_or_resume', kind.load_or_resume)
            kind.load_or_resume = _explained_start(kind.load_or_resume)
        yield


def check_checkpoint(path: str, source: str, hint: str = '') -> None:
    """Refuse a file that is missing (``hint``: how to come by it) or cut off, by the option or key that names it."""
    if '://' in path:
        return
    if not Path(path).exists():
        raise UsageError(f"{source}: no checkpoint '{path}'{in_folder(path)}{hint and '; ' + hint}")
    if not _is_complete(Path(path)):
        raise UsageError(f"{source}: '{path}' is cut off, or no checkpoint of torch's; take another")


def named_checkpoint(work_dir: Path) -> str:
    """What the file ``last_checkpoint`` in a work directory says; '' if there is none."""
    pointer = work_dir / 'last_checkpoint'
    return pointer.read_text().strip() if pointer.is_file() else ''


def last_checkpoint(work_dir: str) -> str | None:
    """The newest checkpoint of a training run that can be resumed, or None.

    The file ``last_checkpoint`` names it. Where that is torn, or names one that is gone or cut off (a run can be killed
    at any time, and a folder moved), the newest complete one in the folder is taken.
    """
    folder = Path(work_dir)
    named = named_checkpoint(folder)
    candidates = sorted([*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')], key=_age, reverse=True)
    if named:
        candidates = [Path(named), folder / Path(named).name, *candidates]
    return next((str(file) for file in candidates if file.exists() and _is_complete(file)), None)


def _explained_load(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapper(cls: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = load(cls, filename, *args, **kwargs)
        except Exception as error:  # torch raises a dozen kinds for damaged files
            advice = explain_load_error(error) or one_line(error)
            raise UserError(f"cannot read the checkpoint '{filename}': {advice}") from error
        if not isinstance(checkpoint, dict):
            kind = type(checkpoint).__name__
            raise UserError(f"cannot use the checkpoint '{filename}': it holds a {kind}, not weights")
        return checkpoint

    return wrapper


def _explained_start(start: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(start)
    def wrapper(self: Any) -> None:
        try:
            start(self)
        except Exception as error:
            if isinstance(error, UserError) and "the checkpoint '" in str(error):
                raise
            purpose = 'resume' if self._resume else 'load'
            said = str(error) if isinstance(error, UserError) else f'it does not fit or is damaged: {one_line(error)}'
            raise UserError(f"cannot {purpose} '{self._load_from}': {said}") from error

    return wrapper


def one_line(error: BaseException) -> str:
    """An error's kind and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}{f": {lines[0]}" if lines else ""}'


def _age(file: Path) -> tuple[int, int]:
    """When a checkpoint was written, and its epoch or iteration: two may be written at one tick of the disk's clock."""
    number = file.stem.rpartition('_')[2]
    return file.stat().st_mtime_ns, int(number) if number.isdecimal() else -1


def _is_complete(file: Path) -> bool:
    """Whether a file is a checkpoint to its end: a zip archive, whose directory comes last, or torch's old pickle."""
    if file.is_dir():  # under FSDP with state_dict_cfg='local', with a file of every process
        ranks = [file / f'rank{rank}.pth' for rank in range(int(os.environ.get('WORLD_SIZE', 1)))]
        return all(part.is_file() and _is_complete(part) for part in ranks)
    with file.open('rb') as stream:
        start = stream.read(2)
    return zipfile.is_zipfile(file) if start == b'PK' else start.startswith(b'\x80')
