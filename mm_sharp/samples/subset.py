"""A captured model call on some of its samples only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from mm_sharp.per_sample_loss.layout import batch_size
from mm_sharp.samples.selection import IntArray


def call_size(owner: str, call: ModelCall) -> int:
    """The number of samples in a call, N; an error, which names ``owner``, if there is no batch, or nothing in it."""
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

    2 if it has a ``BatchNorm1d``, whose input (N, C) has one value a channel for each sample, and a single one has no
    variance; otherwise 1.
    """
    return 2 if any(isinstance(m, (nn.BatchNorm1d, nn.LazyBatchNorm1d)) for m in model.modules()) else 1


@contextmanager
def one_is_enough(
    owner: str, ratio: str, counts: Callable[[], tuple[int, int] | None], leave_out: str = 'drop_last=True'
) -> Iterator[None]:
    """A context of a forward on K of N samples, in which torch's error at a single one shows the way out.

    For the message: ``owner`` has an argument ``ratio`` that K follows from, ``counts`` gives K and N, if known, and
    ``leave_out`` in ``train_dataloader`` leaves out incomplete batches.
    """
    try:
        yield
    except ValueError as error:
        kept, of = counts() or (0, 0)
        if kept != 1 or of == 1 or 'more than 1 value per channel' not in str(error):
            raise
        raise UserError(
            f'{owner} trains on 1 of the {of} samples of this batch, and the model has a layer that normalises over '
            f'several ({error}). Leave out last batches that are too small, train_dataloader = dict({leave_out}, ...), '
            f"or keep more of each, optim_wrapper = dict(type='{owner}', {ratio}=1.0, ...)"
        ) from error


def subset(call: ModelCall, rows: IntArray | Tensor, size: int) -> ModelCall:
    """The call on the samples ``rows`` alone.

    What counts as batched among the arguments: tensors and arrays with N = ``size`` rows, lists of N things that are
    not themselves batches, such as data samples, and both within dicts, lists and tuples. Everything else is shared by
    all samples; a TypeError if it is a collection of N things of a kind that is not known here. Rows on a device cost a
    synchronisation where there is a list, an array or a tensor on the host.
    """
    # Beside a list of data samples, a list of N tensors holds the pictures (of different sizes, say); elsewhere it may
    # hold N inputs of N samples each, which the tensors' shapes tell.
    values = (*call.args, *call.kwargs.values())
    picker = _Picker(
        rows, size, any(type(v) in (list, tuple) and v and isinstance(v[0], BaseDataElement) for v in values)
    )
    args = tuple(picker.pick(value) for value in call.args)
    return replace(call, args=args, kwargs=picker.pick(call.kwargs), output=None)


class _Picker:
    """Takes the chosen rows out of everything in a call that has a row for every sample."""

    def __init__(self, rows: IntArray | Tensor, size: int, lists_hold_samples: bool) -> None:
        self._rows = rows
        self._size = size
        self._lists_hold_samples = lists_hold_samples
        self._on: dict[torch.device, Tensor] = {}
        self._listed: list[int] | None = None

    def pick(self, value: Any) -> Any:
        if isinstance(value, (str, bytes)):
            return value
        if isinstance(value, Tensor):
            return value.index_select(0, self._rows_on(value.device)) if self._has_rows(value) else value
        if isinstance(value, np.ndarray):
            return value[self._list()] if self._has_rows(value) else value
        if isinstance(value, dict):
            return {key: self.pick(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            if self._holds_samples(value):
                return type(value)([value[row] for row in self._list()])
            return type(value)([self.pick(item) for item in value])
        self._check_kind(value)
        return value

    def _has_rows(self, value: Tensor | np.ndarray[Any, Any]) -> bool:
        return value.ndim > 0 and len(value) == self._size

    def _holds_samples(self, value: Sequence[Any]) -> bool:
        return len(value) == self._size and (self._lists_hold_samples or not any(map(self._is_batch, value)))

    def _is_batch(self, value: Any) -> bool:
        if type(value) in (list, tuple):
            return any(map(self._is_batch, value))
        return isinstance(value, Tensor) and self._has_rows(value)

    def _rows_on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            rows = self._rows
            self._on[device] = to_device(rows, device) if isinstance(rows, np.ndarray) else rows.to(device)
        return self._on[device]

    def _list(self) -> list[int]:
        if self._listed is None:
            self._listed = self._rows.tolist()
        return self._listed

    def _check_kind(self, value: Any) -> None:
        """Refuse what would silently keep N rows beside K."""
        if isinstance(value, tuple):  # a named one; torch.Size and the like hold plain numbers
            unknown = any(isinstance(part, (Tensor, np.ndarray)) and self._has_rows(part) for part in value)
        else:
            unknown = hasattr(value, '__len__') and len(value) == self._size
        if unknown:
            raise KindError(
                f'ESAM and AUSAM do not know how to take samples out of a {type(value).__name__} of {self._size}: call '
                'the model with tensors, arrays, lists, tuples or dicts of them'
            )
