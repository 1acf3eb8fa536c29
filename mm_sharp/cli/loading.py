"""Checkpoints in the tools: nothing in a file is run, and whatever is wrong with one is an error of one line (ours)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner

from mm_sharp.compat import explain_load_error, only_weights, trust_checkpoints
from mm_sharp.compat.trust import ALWAYS, is_set
from mm_sharp.errors import UserError


@contextmanager
def careful_loading(trust: bool) -> Iterator[None]:
    """Within, checkpoints are loaded by the rules of our tools, whoever loads them.

    Args:
        trust: Load files that can run code, too.

    Raises:
        UserError: A checkpoint was refused, cannot be read, or does not fit its run; or trust is not possible.
    """
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


def _explained_load(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapper(cls: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = load(cls, filename, *args, **kwargs)
        except Exception as error:  # torch raises a dozen kinds for damaged files
            advice = explain_load_error(error) or _said(error)
            raise UserError(f"cannot read the checkpoint '{filename}': {advice}") from error
        if not isinstance(checkpoint, dict):
            raise UserError(
                f"cannot use the checkpoint '{filename}': it holds a {type(checkpoint).__name__}, not weights"
            )
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
            said = str(error) if isinstance(error, UserError) else f'it does not fit or is damaged: {_said(error)}'
            raise UserError(f"cannot {purpose} '{self._load_from}': {said}") from error

    return wrapper


def _said(error: BaseException) -> str:
    """An error's kind and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}{f": {lines[0]}" if lines else ""}'
