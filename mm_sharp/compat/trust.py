"""Load checkpoints that are not plain on the user's word, and on no other.

Unpickling can run any code that a file's author chose. ``torch.load`` refuses that by default from torch 2.6 on, but
not before, nor in ``torch.hub``, by which MMEngine loads URLs: :func:`only_weights` overrules both.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.runner.checkpoint import CheckpointLoader

# torch's own switches; it knows the first since 1.13, the second since 2.6, and refuses both at once.
ALWAYS, NEVER = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


@contextmanager
def only_weights() -> Iterator[None]:
    """Within, ``torch.load`` builds plain types and tensors only, unless the user's environment says otherwise."""
    if is_set(NEVER):
        yield
        return
    before = os.environ.get(ALWAYS)
    os.environ[ALWAYS] = '1'
    try:
        yield
    finally:
        del os.environ[ALWAYS]
        if before is not None:
            os.environ[ALWAYS] = before


def is_set(switch: str) -> bool:
    """Whether one of torch's switches is set, as torch understands it."""
    return os.environ.get(switch, '0').lower() in ('1', 'y', 'yes', 'true')


def trust_checkpoints() -> ExitStack:
    """From now on, or within ``with``, MMEngine loads checkpoint files of this machine with ``weights_only=False``."""
    original = CheckpointLoader._get_checkpoint_loader('')

    @functools.wraps(original)  # MMEngine logs the loader's name
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        path = os.path.expanduser(filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f'the checkpoint {filename} can not be found')
        return torch.load(path, map_location=map_location, weights_only=False)

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    trust = ExitStack()
    trust.callback(CheckpointLoader.register_scheme, '', original, force=True)
    return trust


def explain_load_error(error: BaseException) -> str | None:
    """What to tell the user of an error that a checkpoint caused which is not plain; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, pickle.UnpicklingError) and 'weights_only' in str(seen):
            return (
                'the checkpoint holds more than weights and plain values, as those written by MMEngine '
                'without mm_sharp do, or is damaged. If you know who made it, repeat the command with '
                '--trust-checkpoint: loading such a file can run any code that its author put into it. (In a tool '
                f'without this option: {NEVER}=1, at the same risk.)'
            )
        seen = seen.__cause__ or seen.__context__
    return None
