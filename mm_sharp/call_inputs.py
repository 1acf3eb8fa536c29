"""The inputs of a model call, as they were before it (ours).

Every forward pass of a step gets the same batch, whatever an earlier one has done to it: lists, dicts and data samples
are handed out as shallow copies, and tensors and arrays as copies where the model was seen to write to them
(:mod:`mm_sharp.rare_changes`). The first pass gets what the caller has passed, and changes it as it would without us.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.structures import BaseDataElement
from torch import Tensor

from mm_sharp.rare_changes import RareChanges, Stamp, stamped_changed, stamps


class InputKeeper:
    """Keeps the inputs of a step's first forward pass for the further ones."""

    def __init__(self) -> None:
        self._rare = RareChanges()
        self._pairs: list[tuple[Any, Any]] = []
        self._stamps: list[Stamp] = []

    def keep(self, value: Any) -> tuple[Any, bool]:
        """Keep inputs, just before the first forward pass.

        Args:
            value: The arguments.

        Returns:
            The kept ones, and whether the model may write to tensors and arrays among them: further passes then get
            copies (:func:`fresh`).
        """
        may_write = self._rare.next_step()
        leaves: list[Any] = []
        kept = fresh(value, may_write, leaves)
        if may_write:
            copies: list[Any] = []
            fresh(kept, False, copies)
            self._pairs, self._stamps = list(zip(leaves, copies, strict=True)), []
        else:
            self._pairs, self._stamps = [], stamps(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return kept, may_write

    def look(self) -> None:
        """Find out if the first forward pass has written to them."""
        tensors = [pair for pair in self._pairs if isinstance(pair[0], Tensor)]
        arrays = [pair for pair in self._pairs if not isinstance(pair[0], Tensor)]
        self._rare.compare([tensor for tensor, _ in tensors], [copy for _, copy in tensors])
        if stamped_changed(self._stamps) or not all(map(_same_array, arrays)):
            self._rare.seen()
        self._pairs, self._stamps = [], []


def fresh(value: Any, copies: bool, leaves: list[Any] | None = None) -> Any:
    """``value`` with lists, tuples, dicts and data samples of its own.

    Args:
        value: Arguments of a model.
        copies: Whether tensors and NumPy arrays are copied as well.
        leaves: Takes the tensors and arrays of ``value``, in order.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        if leaves is not None:
            leaves.append(value)
        if not copies:
            return value
        return value.clone() if isinstance(value, Tensor) else value.copy()
    kind = type(value)
    if kind is dict:
        return {key: fresh(item, copies, leaves) for key, item in value.items()}
    if kind is list or kind is tuple:
        return kind(fresh(item, copies, leaves) for item in value)
    return _fresh_element(value, copies, leaves) if isinstance(value, BaseDataElement) else value


def _fresh_element(element: BaseDataElement, copies: bool, leaves: list[Any] | None) -> BaseDataElement:
    """The same for a data sample: what is set, replaced or deleted in it does not reach the original."""
    twin: BaseDataElement = object.__new__(type(element))
    attributes = vars(twin)
    attributes.update(vars(element))
    attributes['_metainfo_fields'] = set(element._metainfo_fields)
    attributes['_data_fields'] = set(element._data_fields)
    for name in element._data_fields & attributes.keys():  # a name may outlive its value
        attributes[name] = fresh(attributes[name], copies, leaves)
    return twin


def _same_array(pair: tuple[Any, Any]) -> bool:
    array, copy = pair
    if array.dtype.kind == 'O':  # what its objects are to each other, nobody knows here
        return True
    return bool(np.array_equal(array, copy, equal_nan=array.dtype.kind in 'fc'))
