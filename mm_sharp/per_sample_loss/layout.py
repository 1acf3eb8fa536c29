"""Which arguments of a loss, or of a model, have a row for every sample, and the arguments of one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from mm_sharp.errors import KindError


@dataclass(frozen=True)
class Slot:
    """The place of the ``index``-th batched value within nested containers."""

    index: int


@dataclass
class Layout:
    """The arguments of one call, taken apart into rows and the rest."""

    size: int  # samples in the batch, N
    # Paths of tensors known to have no row for every sample, as a vector over 17 keypoints in a batch of 17.
    shared: set[str] = field(default_factory=set)
    # Whether every list of N items holds one for each sample, also of tensors with N rows, such as SimCC's x and y.
    lists_of_samples: bool = False
    # Whether it is a model's call: a list of N numbers or strings, or an array of N rows, holds one for each, and N
    # things of a kind that is not known here are refused.
    of_model: bool = False
    template: Any = None
    rows: list[Tensor | Sequence[Any]] = field(default_factory=list)

    def split(self, value: Any, path: str = '') -> Any:
        """``value`` with a :class:`Slot` in the place of everything batched, which goes to :attr:`rows`."""
        if isinstance(value, Tensor):
            batched = self._has_batch(value)
            if self.size > 1 and not batched:
                self.shared.add(path)  # a single sample shows nothing: its masks may have one row for all
            return self._slot(value) if batched and path not in self.shared else value
        if self.of_model and isinstance(value, np.ndarray):
            return self._slot(value) if value.ndim > 0 and len(value) == self.size else value
        if type(value) in (list, tuple):
            if self._is_list_of_samples(value):
                return self._slot(value)
            return type(value)(self.split(item, f'{path}.{i}') for i, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self.split(item, f'{path}.{key}') for key, item in value.items()}
        if self.of_model and not isinstance(value, (str, bytes)):
            self._check_kind(value)
        return value

    def split_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        """Take each argument apart by itself: as many arguments as samples are no list of samples; gives the layout."""
        self.template = (
            tuple(self.split(value, f'args.{number}') for number, value in enumerate(args)),
            {name: self.split(value, f'kwargs.{name}') for name, value in kwargs.items()},
        )
        return self

    def sample(self, number: int) -> list[Any]:
        """The rows of sample ``number`` as a batch of one."""
        return [row[number : number + 1] for row in self.rows]

    def _slot(self, value: Any) -> Slot:
        self.rows.append(value)
        return Slot(len(self.rows) - 1)

    def _is_list_of_samples(self, value: Sequence[Any]) -> bool:
        if len(value) != self.size:
            return False
        if any(item is None or isinstance(item, (Number, str)) for item in value):
            return self.of_model
        return self.lists_of_samples or not any(self._has_batch(item) for item in value)

    def _has_batch(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.ndim > 0 and value.shape[0] == self.size
        return type(value) in (list, tuple) and any(self._has_batch(item) for item in value)

    def _check_kind(self, value: Any) -> None:
        """Refuse what would silently keep N rows beside K."""
        if isinstance(value, tuple):  # a named one; torch.Size and the like hold plain numbers
            parts = [part for part in value if isinstance(part, (Tensor, np.ndarray)) and part.ndim > 0]
            unknown = any(len(part) == self.size for part in parts)
        else:
            unknown = hasattr(value, '__len__') and len(value) == self.size
        if unknown:
            raise KindError(
                f'ESAM and AUSAM do not know how to take samples out of a {type(value).__name__} of {self.size}: call '
                'the model with tensors, arrays, lists, tuples or dicts of them'
            )


def map_all(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to everything of a ``kind`` in nested containers, in order."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_all(kind, function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_all(kind, function, item) for key, item in value.items()}
    return value


def fill(template: Any, values: Sequence[Any]) -> Any:
    """``template`` with ``values`` in the places of its slots."""
    return map_all(Slot, lambda slot: values[slot.index], template)


def tensors_of(value: Any) -> tuple[Any, list[Tensor]]:
    """A template of ``value``, which :func:`fill` takes, and the tensors in it, in order."""
    found: list[Tensor] = []

    def slot(tensor: Tensor) -> Slot:
        found.append(tensor)
        return Slot(len(found) - 1)

    return map_all(Tensor, slot, value), found


def first_tensor(value: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_of(value)[1] if tensor.ndim > 0), None)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of samples that a model is called with, None if it has no batch.

    The length of the list ``data_samples``; else the rows of the first argument that is a tensor; else the length of
    the first list, or the rows of the first tensor anywhere.
    """
    samples = kwargs.get('data_samples')
    if isinstance(samples, (list, tuple)):
        return len(samples)
    values = [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
    for value in values:
        if type(value) in (list, tuple) and len(value) > 0 and not isinstance(value[0], (Number, str)):
            return len(value)  # images of different sizes, or data samples
        if (tensor := first_tensor(value)) is not None:
            return tensor.shape[0]
    return None
