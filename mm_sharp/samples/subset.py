"""A captured model call on some of its samples only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mm_sharp.errors import UserError
from mm_sharp.ops.call_inputs import fresh
from mm_sharp.ops.host_copy import to_device
from mm_sharp.ops.model_call import ModelCall, unwrap
from mm_sharp.per_sample_loss.layout import Layout, batch_size, fill
from mm_sharp.samples.selection import IntArray


def call_size(owner: str, call: ModelCall) -> int:
    """The number of samples in a call, N; an error, which names ``owner``, if there is no batch, or nothing in it."""
    size = batch_size(call.args, call.kwargs)
    if not size:
        found = [type(value).__name__ for value in _values(call)]
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
    beside = any(type(v) in (list, tuple) and v and isinstance(v[0], BaseDataElement) for v in _values(call))
    on: dict[object, Any] = {}  # the rows, by device, and as a list

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            device = value.device
            if device not in on:
                on[device] = to_device(rows, device) if isinstance(rows, np.ndarray) else rows.to(device)
            return value.index_select(0, on[device])
        listed = on.get(list) or on.setdefault(list, rows.tolist())
        return value[listed] if isinstance(value, np.ndarray) else type(value)(_items(value, listed))

    layout = Layout(size, lists_of_samples=beside, of_model=True).split_call(call.args, call.kwargs)
    args, kwargs = fill(layout.template, [take(value) for value in layout.rows])
    return replace(call, args=args, kwargs=kwargs, output=None)


def _items(items: Sequence[Any], rows: list[int]) -> list[Any]:
    """Items of a list; one that comes again is another object, since a model may change each of them."""
    seen: set[int] = set()
    found = []
    for row in rows:
        found.append(fresh(items[row], copies=True) if row in seen else items[row])
        seen.add(row)
    return found


def _values(call: ModelCall) -> tuple[Any, ...]:
    return (*call.args, *call.kwargs.values())
