"""Load checkpoints that are not plain, on the user's word (ours).

Unpickling can run any code that a file's author chose. ``torch.load`` therefore refuses everything but plain
types and tensors (``weights_only=True``, the default from torch 2.6 on), and so refuses checkpoints that plain
MMEngine wrote. Whoever knows where a file comes from may load it all the same; nobody does so by accident.
"""

from __future__ import annotations

import functools
import os
import pickle
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.runner.checkpoint import CheckpointLoader

_FLAG = '--trust-checkpoint'


def trust_checkpoints() -> ExitStack:
    """From now on, MMEngine loads local checkpoint files whole (``weights_only=False``).

    Only files of this machine: weights that a config names by URL are loaded as before, and so are calls of
    ``torch.load`` outside MMEngine's loader.

    Returns:
        A context manager that ends the trust: ``with trust_checkpoints(): runner.test()``. A program that
        trusts for as long as it runs may ignore it.
    """
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
    """What to do about an error that came from loading a checkpoint which is not plain.

    Args:
        error: what was caught; the errors that it was raised from are looked at, too.

    Returns:
        A line for the user, which names the flag and its risk; None if the error is about something else.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, pickle.UnpicklingError) and 'weights_only' in str(seen):
            return (
                'the checkpoint holds more than weights and plain values, as those written by MMEngine '
                f'without mm_sharp do. If you know who made it, repeat the command with {_FLAG}: loading '
                'such a file can run any code that its author put into it. (In a tool without this option: '
                'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, at the same risk.)'
            )
        seen = seen.__cause__ or seen.__context__
    return None
