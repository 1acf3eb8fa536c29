"""When to copy what few models change in a forward pass: frozen weights, tensors that are plain attributes, the inputs.

Copies in every step would cost all models. So they are made in some steps, fewer and fewer, and in every step as soon
as a change was seen. In the steps between, ``Tensor._version`` shows most changes at no cost, one step late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, eq, is_, methodcaller
from typing import Any

import torch
from torch import Tensor

from mm_sharp.ops.host_copy import HostCopy

_ALL_UP_TO = 10
_VALUES = methodcaller('values')
_version = attrgetter('_version')


class RareChanges:
    """Decides in which steps such tensors are copied, and finds out if they have changed."""

    def __init__(self) -> None:
        self._steps = 0
        self._seen = False
        self._compared: list[HostCopy] = []
        self._tensors: Sequence[Tensor] = ()
        self._copies: Sequence[Tensor] | None = None
        self._versions: list[tuple[int, int]] = []

    @property
    def every_step(self) -> bool:
        """Whether a change was seen, so that copies are made in every step."""
        return self._seen

    def next_step(self) -> bool:
        """Begin a step; returns whether copies are to be made in it."""
        self._steps += 1
        while self._compared and self._compared[0].ready:
            self._seen |= bool(self._compared.pop(0).numpy())
        # Triangular numbers: of these some are multiples of n, for whatever is done every n-th step.
        triangular = math.isqrt(8 * self._steps + 1) ** 2 == 8 * self._steps + 1
        return self._seen or self._steps <= _ALL_UP_TO or triangular

    def seen(self) -> None:
        """Note that a tensor has changed: from the next step on, copies are made in every step."""
        self._seen = True

    def watch(self, tensors: Sequence[Tensor], copies: Sequence[Tensor] | None) -> None:
        """Prepare :meth:`changed`, which compares tensors with ``copies`` or, without, looks at their versions."""
        self._tensors, self._copies = tensors, copies
        self._versions = versions_of(tensors) if copies is None else []

    def changed(self) -> bool:
        """Whether the tensors may have changed since :meth:`watch`; an accelerator's answer counts in a later step.

        By their versions, a change through ``.data`` or NumPy is not seen.
        """
        if self._copies is None:
            changed = versions_of(self._tensors) != self._versions
            self._seen |= changed
            return changed
        if self._seen or not self._tensors:
            return self._seen
        pairs = [*zip(self._tensors, self._copies, strict=True)]
        if all(tensor.device.type == 'cpu' for tensor in self._tensors):
            self._seen = not all(torch.equal(tensor, copy) for tensor, copy in pairs)
            return self._seen
        if any(tensor.shape != copy.shape for tensor, copy in pairs):
            self._seen = True
            return True
        flags = [(tensor != copy).any() for tensor, copy in pairs]
        self._compared.append(HostCopy(torch.stack([flag.to(flags[0].device) for flag in flags]).any()))
        return True


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor can be copied and compared: not sparse, nested, MKLDNN's, inference mode's or meta."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_inference() or tensor.is_meta)


def same_objects(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> bool:
    """Whether dicts have the same names and objects."""
    parts = [(chain.from_iterable(now), chain.from_iterable(before)), (all_values(now), all_values(before))]
    return all(map(eq, map(len, now), map(len, before))) and all(all(map(is_, *pair)) for pair in parts)


def all_values(dicts: Iterable[Mapping[str, Any]]) -> Iterable[Any]:
    """The values of all dicts, one after the other."""
    return chain.from_iterable(map(_VALUES, dicts))


def same_items(now: Any, before: Any) -> bool:
    """Whether two lists, or two of another kind of container, hold the same objects in the same places."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(map(is_, now.values(), before.values())) and now.keys() == before.keys()
    return all(map(is_, now, before))


def versions_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What becomes another where a tensor is written to, but through ``.data`` or NumPy."""
    if not tensors:
        return []
    if any(map(Tensor.is_inference, tensors)):  # they have no version
        return [(0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors]
    return list(zip(map(_version, tensors), map(Tensor.data_ptr, tensors), strict=True))
