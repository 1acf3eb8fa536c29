"""Load checkpoints that are not plain, on the user's word and on no other (ours).

Unpickling can run any code that a file's author chose. ``torch.load`` therefore refuses everything but plain
types and tensors (``weights_only=True``, the default from torch 2.6 on), and so refuses checkpoints that plain
MMEngine wrote. Whoever knows where a file comes from may load it all the same; nobody does so by accident.

The default alone does not do it: torch 2.1 to 2.5 have the other one, and ``torch.hub``, through which MMEngine loads
what a config names by URL, asks for ``weights_only=False`` even in torch 2.13. :func:`only_weights` overrules both.
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

_FLAG = '--trust-checkpoint'
# torch's own switches; it knows the first since 1.13, the second since 2.6, and refuses both at once.
ALWAYS, NEVER = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


@contextmanager
def only_weights() -> Iterator[None]:
    """Within, ``torch.load`` builds plain types and tensors only, whatever its caller asks for; processes started, too.

    Does nothing where the user has set ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``, which is a word of the user's as well.
    """
    if is_set(NEVER):
        yield
        return
    before = os.environ.get(ALWAYS)
    os.environ[ALWAYS] = '1'
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALWAYS]
        else:
            os.environ[ALWAYS] = before


def is_set(switch: str) -> bool:
    """Whether the user has set one of torch's switches, as torch understands it."""
    return os.environ.get(switch, '0').lower() in ('1', 'y', 'yes', 'true')


def trust_checkpoints() -> ExitStack:
    """From now on, MMEngine loads local checkpoint files whole (``weights_only=False``).

    Only files of this machine: calls of ``torch.load`` outside MMEngine's loader keep their own ways, and so does
    torch's loader of URLs, which loads whole files if :func:`only_weights` does not keep it from that.

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
                'without mm_sharp do, or is damaged. If you know who made it, repeat the command with '
                f'{_FLAG}: loading such a file can run any code that its author put into it. (In a tool without '
                f'this option: {NEVER}=1, at the same risk.)'
            )
        seen = seen.__cause__ or seen.__context__
    return None
