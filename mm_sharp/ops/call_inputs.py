"""The inputs of a model call, as they were before it.

Every forward pass of a step gets the same batch, whatever an earlier one has done to it. The first one gets what the
caller has passed. The others get shallow copies of lists, dicts and data samples, and copies of tensors and arrays
where the model was seen to write to them (:mod:`mm_sharp.ops.rare_changes`).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mm_sharp.ops.rare_changes import RareChanges, is_ordinary

Leaves = list[tuple[Any, Any]]

_ATOMS = frozenset({type(None), bool, int, float, str, bytes})


class InputSnapshot:
    """Copies of the inputs of a step's first forward pass for the further ones."""

    def __init__(self) -> None:
        self._rare = RareChanges()
        self._arrays: Leaves = []

    def take(self, value: Any) -> tuple[Any, bool]:
        """Copy arguments, just before the first forward pass.

        Returns:
            The copy, and whether the model may write to tensors and arrays: further passes then get copies of them.
        """
        may_write = self._rare.next_step()
        pairs: Leaves = []
        kept = fresh(value, may_write, pairs)
        tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
        self._arrays = [pair for pair in pairs if may_write and not isinstance(pair[0], Tensor)]
        self._rare.watch([tensor for tensor, _ in tensors], [copy for _, copy in tensors] if may_write else None)
        return kept, may_write

    def check(self) -> None:
        """Find out if the first forward pass has written to the inputs."""
        if not all(map(_same_array, self._arrays)):
            self._rare.seen()
        self._rare.changed()
        self._rare.watch((), None)
        self._arrays = []


def fresh(value: Any, copies: bool, leaves: Leaves | None = None, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a model's arguments with lists, tuples, dicts and data samples of its own.

    With ``copies`` tensors and NumPy arrays are copied as well. ``leaves`` takes those that can be, each with what
    stands for it. ``memo`` has the copies by the originals' ``id``: what is one object stays one.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is Tensor and not copies and not (value.requires_grad and value.is_leaf):
        if leaves is not None and is_ordinary(value):
            leaves.append((value, value))
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (Tensor, np.ndarray)):
        memo[id(value)] = _fresh_leaf(value, copies, leaves)
    elif kind is tuple:
        items = [fresh(item, copies, leaves, memo) for item in value]
        return tuple(items)
    elif isinstance(value, tuple) and hasattr(value, '_make'):
        return kind._make(fresh(item, copies, leaves, memo) for item in value)
    elif isinstance(value, (list, dict)):
        twin = memo[id(value)] = value.copy() if kind is dict else copy.copy(value)
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            twin[key] = fresh(item, copies, leaves, memo)
    elif isinstance(value, BaseDataElement):
        _fresh_element(value, copies, leaves, memo)
    else:
        return value
    return memo[id(value)]


def _fresh_leaf(value: Any, copies: bool, leaves: Leaves | None) -> Any:
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            value = value.detach().requires_grad_()  # its gradient is that of the first pass
        if not is_ordinary(value):
            return value
    twin = _copied(value) if copies else value
    if leaves is not None:
        leaves.append((value, twin))
    return twin


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value.copy()
    if value.is_contiguous() or 0 in value.stride():
        return value.clone()
    # Strided as it is, so that sums are taken in the same order.
    twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return twin.copy_(value)


def _fresh_element(element: BaseDataElement, copies: bool, leaves: Leaves | None, memo: dict[int, Any]) -> None:
    twin = memo[id(element)] = object.__new__(type(element))
    attributes = vars(twin)
    attributes.update(vars(element))
    attributes['_metainfo_fields'] = set(element._metainfo_fields)
    attributes['_data_fields'] = set(element._data_fields)
    # A name may outlive its value. Meta information is many small things that hardly anybody changes in place.
    names = element._data_fields | element._metainfo_fields if copies else element._data_fields
    for name in names & attributes.keys():
        attributes[name] = fresh(attributes[name], copies, leaves, memo)


def _same_array(pair: tuple[Any, Any]) -> bool:
    array, was = pair
    kind = array.dtype.kind  # objects may not be comparable
    return kind == 'O' or bool(np.array_equal(array, was, equal_nan=kind in 'fc'))
