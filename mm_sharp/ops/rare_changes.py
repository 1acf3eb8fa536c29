"""What few models change in a forward pass, and how it is kept for those that do.

Frozen weights (of momentum teachers), tensors that are plain attributes, and the inputs: copies of them in every step
would be paid for by all models. So they are kept in some steps, fewer and fewer, and in every step as soon as one of
them was seen to change. In the steps between, ``Tensor._version`` shows most changes at no cost, one step late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mm_sharp.ops.host_copy import HostCopy

Stamp = tuple[Tensor, int, int]

_ALL_UP_TO = 10


class RareChanges:
    """Decides in which steps such tensors are kept."""

    def __init__(self) -> None:
        self._steps = 0
        self._seen = False
        self._compared: list[HostCopy] = []

    @property
    def every_step(self) -> bool:
        """Whether a change was seen, so that copies are kept in every step."""
        return self._seen

    def next_step(self) -> bool:
        """Begin a step; returns whether copies are to be kept in it."""
        self._steps += 1
        while self._compared and self._compared[0].ready:
            self._seen |= bool(self._compared.pop(0).numpy())
        return self._seen or self._steps <= _ALL_UP_TO or _is_triangular(self._steps)

    def seen(self) -> None:
        """Note that a tensor has changed: from the next step on, copies are kept in every step."""
        self._seen = True

    def compare(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
        """Find out if tensors have changed since they were copied.

        Args:
            tensors: The tensors.
            copies: Of each, the copy.

        Returns:
            Whether they may have; an accelerator is not waited for, so that a later step knows.
        """
        if self._seen or not tensors:
            return self._seen
        pairs = zip(tensors, copies, strict=True)
        if all(tensor.device.type == 'cpu' for tensor in tensors):
            self._seen = not all(torch.equal(tensor, copy) for tensor, copy in pairs)
            return self._seen
        changed = [(tensor != copy).any() for tensor, copy in pairs]
        self._compared.append(HostCopy(torch.stack([flag.to(changed[0].device) for flag in changed]).any()))
        return True


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor can be copied and compared with others: not sparse, nested, MKLDNN's, inference mode's, meta."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_inference() or tensor.is_meta)


def _is_triangular(number: int) -> bool:
    """Whether it is 1 + 2 + … + k: of these some are multiples of n, for whatever is done every n-th step."""
    square = 8 * number + 1
    return math.isqrt(square) ** 2 == square


def stamps(tensors: Iterable[Tensor]) -> list[Stamp]:
    """What shows later, at no cost, whether tensors were changed by ordinary in-place operations."""
    return [(tensor, _version(tensor), tensor.data_ptr()) for tensor in tensors]


def stamped_changed(stamped: Iterable[Stamp]) -> bool:
    """Whether one of the tensors has changed since. What is written through ``.data`` or NumPy is not seen."""
    return any(_version(tensor) != version or tensor.data_ptr() != where for tensor, version, where in stamped)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
