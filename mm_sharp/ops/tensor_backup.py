"""An exact copy of some tensors, such as the weights before the perturbation.

Weights come back by copying, never by subtracting the perturbation: floating-point subtraction does not undo an
addition.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mm_sharp.ops.perturbation import group_by_device_and_dtype


class TensorBackup:
    """Copies of tensors, in memory that is allocated once and used again in every step.

    One backup at a time: :meth:`save`, :meth:`write_back` any number of times, then :meth:`restore` or :meth:`discard`.
    Restoring twice, or without saving, does nothing.
    """

    def __init__(self) -> None:
        # Weak: memory for a tensor that is gone goes with it.
        self._memory: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._last: list[ref[Tensor]] = []  # what was saved last, which is mostly saved again
        self._last_copies: list[Tensor] = []
        self._kinds: list[Any] = []
        self._groups: list[list[int]] = []
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled: a copy allocates memory of its own.
        return {'_tensors': self._tensors, '_copies': self._copies, '_groups': self._groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    @property
    def saved(self) -> bool:
        """Whether tensors are kept that have not been restored."""
        return bool(self._tensors)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that are kept now, each with its copy."""
        return list(zip(self._tensors, self._copies, strict=True))

    def save(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors``; an earlier backup must have been restored or discarded."""
        if self.saved:
            raise RuntimeError('The tensors of an earlier backup have not been restored')
        if not tensors:
            return
        kinds = [*map(_kind, tensors)]
        same = len(tensors) == len(self._last) and all(map(is_, [last() for last in self._last], tensors))
        if not same or kinds != self._kinds:
            copies, last = [self._copy_of(tensor) for tensor in tensors], [ref(tensor) for tensor in tensors]
            groups = group_by_device_and_dtype(tensors)
            # Together: what is broken off here leaves nothing that does not belong together.
            self._last_copies, self._last, self._kinds, self._groups = copies, last, kinds, groups
        _foreach_copy(self._last_copies, tensors, self._groups)
        self._tensors, self._copies = list(tensors), self._last_copies

    def write_back(self, apart_from: Iterable[Tensor] = (), *, unseen: bool = False) -> None:
        """Write the copies back, bit for bit, into the storage they were taken from, but no memory of ``apart_from``.

        ``unseen``: autograd is not told. Between a forward and its backward pass it would refuse tensors that were
        written to, though they have what the forward saw again by then.
        """
        if not self._tensors:
            return
        tensors, copies, groups = self._tensors, self._copies, self._groups
        if taken := set(map(_storage_of, apart_from)):
            pairs = [pair for pair in self.pairs if _storage_of(pair[0]) not in taken]
            tensors, copies = [tensor for tensor, _ in pairs], [copy for _, copy in pairs]
            groups = group_by_device_and_dtype(tensors)
        for tensor, copy in zip(tensors, copies, strict=True):
            if tensor.shape != copy.shape:  # resized since
                tensor.data = torch.empty_like(copy)
        _foreach_copy([tensor.data for tensor in tensors] if unseen else tensors, copies, groups)

    def restore(self) -> None:
        """Write the copies back, and forget them."""
        self.write_back()
        self.discard()

    def discard(self, *, release: bool = False) -> None:
        """Forget the backup; the memory stays for the next one unless ``release`` is set."""
        self._tensors, self._copies = [], []
        if release:
            self._memory, self._last, self._last_copies = WeakTensorKeyDictionary(), [], []

    def _copy_of(self, tensor: Tensor) -> Tensor:
        memory = self._memory.get(tensor)
        if memory is None or _kind(memory) != _kind(tensor):
            memory = self._memory[tensor] = torch.empty_like(tensor, requires_grad=False)
        return memory


_kind = attrgetter('shape', 'dtype', 'device')


def _storage_of(tensor: Tensor) -> int:
    """A number that tensors which share memory have in common."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _foreach_copy(destinations: Sequence[Tensor], sources: Sequence[Tensor], groups: list[list[int]]) -> None:
    """Copy every source into its destination; ``groups`` are the indices of those of one device and dtype."""
    with torch.no_grad():
        if len(groups) == 1:
            torch._foreach_copy_(destinations, sources)  # type: ignore[arg-type]  # any sequence does
            return
        for group in groups:
            torch._foreach_copy_([destinations[i] for i in group], [sources[i] for i in group])
