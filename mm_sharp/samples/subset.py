"""A captured model call on some of its samples only (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mm_sharp.errors import KindError, UserError
from mm_sharp.ops.host_copy import to_device
from mm_sharp.ops.model_call import ModelCall, unwrap
from mm_sharp.per_sample_loss.layout import Layout, batch_size, fill
from mm_sharp.samples.selection import IntArray


def call_size(owner: str, call: ModelCall) -> int:
    """The number of samples in a call, N.

    Args:
        owner: Class that asks, for the message.
        call: The call.

    Raises:
        ValueError: None of the arguments is a batch, or the batch is empty.
    """
    size = batch_size(call.args, call.kwargs)
    if not size:
        found = [type(value).__name__ for value in (*call.args, *call.kwargs.values())]
        raise UserError(
            f'{owner} found no batch among the arguments ({", ".join(found)}) that {type(unwrap(call.model)).__name__} '
            'was called with: one must be a tensor or a list with a row for every sample, at least one'
        )
    return size


def fewest_samples(model: nn.Module) -> int:
    """The fewest samples of a batch that ``model`` can be trained on.

    Returns:
        2 if it has a ``BatchNorm1d``, whose input (N, C) has one value a channel for each sample, and a single one has
        no variance; otherwise 1.
    """
    return 2 if any(isinstance(m, (nn.BatchNorm1d, nn.LazyBatchNorm1d)) for m in model.modules()) else 1


@contextmanager
def one_is_enough(
    owner: str, ratio: str, counts: Callable[[], tuple[int, int]], leave_out: str = 'drop_last=True'
) -> Iterator[None]:
    """A context of a forward on some samples of a batch, in which torch's error at a single one shows the way out.

    Args:
        owner: Class that has taken them, for the message.
        ratio: Name of the argument that K follows from.
        counts: Gives K and N.
        leave_out: What leaves out incomplete batches, as it is written into ``train_dataloader``.

    Raises:
        UserError: Only one of several was kept, and a layer normalises over the batch.
    """
    try:
        yield
    except ValueError as error:
        kept, of = counts()
        if kept != 1 or of == 1 or 'more than 1 value per channel' not in str(error):
            raise
        raise UserError(
            f'{owner} trains on 1 of the {of} samples of this batch, and the model has a layer that normalises over '
            f'several ({error}). Leave out last batches that are too small, train_dataloader = dict({leave_out}, ...), '
            f"or keep more of each, optim_wrapper = dict(type='{owner}', {ratio}=1.0, ...)"
        ) from error


def subset(call: ModelCall, rows: IntArray | Tensor, size: int) -> ModelCall:
    """The call on the samples ``rows`` alone.

    What counts as batched among the arguments: tensors and arrays with N rows, lists of N things that are not
    themselves batches, such as data samples, and both within dicts, lists and tuples. Everything else is shared by all
    samples.

    Args:
        call: A call on N samples.
        rows: Rows to keep, (K,), on the host or on a device. Rows on a device cost a synchronisation where there is a
            Python list, an array or a tensor on the host among the arguments.
        size: N.

    Raises:
        TypeError: An argument is a collection of N things of a kind that is not known here.
    """
    for value in (*call.args, *call.kwargs.values()):
        _check_kind(value, size)
    # Beside a list of data samples, a list of N tensors holds the pictures (of different sizes, say); elsewhere it may
    # hold N inputs of N samples each, which the tensors' shapes tell.
    samples = any(_are_data_samples(value) for value in (*call.args, *call.kwargs.values()))
    layout = Layout(size, lists_of_samples=samples, plain_values=True)
    # Each argument has a path of its own: a tensor that is shared must not hide those after it.
    args = [layout.split(value, str(number)) for number, value in enumerate(call.args)]
    kwargs = {name: layout.split(value, name) for name, value in call.kwargs.items()}
    picked = _Picker(rows)
    values = [picked(value) for value in layout.rows]
    return replace(call, args=tuple(fill(args, values)), kwargs=fill(kwargs, values), output=None)


class _Picker:
    """Takes the chosen rows out of tensors and lists."""

    def __init__(self, rows: IntArray | Tensor) -> None:
        self._given = rows
        self._on: dict[torch.device, Tensor] = {}
        self._listed: list[int] | None = None

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, self._indices(value.device))
        if self._listed is None:
            self._listed = [int(row) for row in self._given.tolist()]
        if isinstance(value, np.ndarray):
            return value[self._listed]
        return type(value)(value[row] for row in self._listed)

    def _indices(self, device: torch.device) -> Tensor:
        if device not in self._on:
            rows = self._given
            self._on[device] = to_device(rows, device) if isinstance(rows, np.ndarray) else rows.to(device)
        return self._on[device]


def _check_kind(value: Any, size: int) -> None:
    """Refuse what would silently keep N rows beside K."""
    if type(value) in (list, tuple, dict):
        for part in value.values() if isinstance(value, dict) else value:
            # The things in a list of samples may be anything.
            if len(value) != size or isinstance(part, (dict, list, tuple)):
                _check_kind(part, size)
        return
    if isinstance(value, tuple):  # a named one; torch.Size and the like hold plain numbers
        unknown = any(isinstance(part, (Tensor, np.ndarray)) and part.ndim and len(part) == size for part in value)
    else:
        known = (Tensor, np.ndarray, str, bytes)
        unknown = not isinstance(value, known) and hasattr(value, '__len__') and len(value) == size
    if unknown:
        raise KindError(
            f'ESAM and AUSAM do not know how to take samples out of a {type(value).__name__} of {size}: call the model '
            'with tensors, arrays, lists, tuples or dicts of them'
        )


def _are_data_samples(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], BaseDataElement)
