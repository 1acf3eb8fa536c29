"""Which data set within others, and which sample of it, an index leads to (ours).

A tree of nodes follows the wrappers around data sets down to its leaves. All index arithmetic is on arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from mmengine.dataset import ClassBalancedDataset, RepeatDataset
from torch.utils.data import ConcatDataset, Subset

from mm_sharp.samples.dataset_keys.leaves import IntArray, Leaf, leaf_of, meta_keys
from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import SampleIdError


class Node(Protocol):
    """A data set, as the place that indices belong to."""

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        """Where indices lead.

        Args:
            rows: A number for each index, (N,), to know it again by.
            indices: (N,), each in the data set's range.

        Yields:
            A leaf, the rows that lead to it, and their indices there.

        Raises:
            SampleIdError: The samples are drawn while loading.
        """

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        """Leaves, and the indices there to which ``indices``, (N,), can lead."""


class Renamed:
    """A data set that has another's samples under other indices.

    Args:
        inner: The other.
        rename: The indices there of indices here.
    """

    def __init__(self, inner: Node, rename: Callable[[IntArray], IntArray]) -> None:
        self.inner = inner
        self.rename = rename

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        yield from self.inner.locate(rows, self.rename(indices))

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        yield from self.inner.members(np.unique(self.rename(indices)))


class Sliced(Renamed):
    """The first samples of a data set, as MMEngine's ``_SlicedDataset`` has them (``num_batch_per_epoch``).

    Args:
        inner: The data set.
        length: Its length, in samples; the slice may be said to be longer.
        endless: Whether it can be indexed beyond its length.
    """

    def __init__(self, inner: Node, length: int, endless: bool) -> None:
        super().__init__(inner, lambda indices: indices)
        self.length = length
        self.endless = endless

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        beyond = indices[indices >= self.length]
        if len(beyond) and not self.endless:
            raise IndexError(
                f'index {beyond[0]} is not in [0, {self.length}), the range of the data set: num_batch_per_epoch asks '
                'for more samples than it has. Make it smaller, or repeat the data set:\n'
                "    dataset=dict(type='RepeatDataset', times=2, dataset=...)"
            )
        yield from super().locate(rows, indices)

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        # What lies beyond either cannot be loaded or is one of these again.
        yield from super().members(indices[indices < self.length])


class Joined:
    """Several data sets in a row.

    Args:
        inner: They.
        lengths: Their lengths, in samples.
    """

    def __init__(self, inner: list[Node], lengths: list[int]) -> None:
        self.inner = inner
        self.ends = np.cumsum(lengths, dtype=np.int64)

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        for inner, chosen, there in self._split(indices):
            yield from inner.locate(rows[chosen], there)

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        for inner, _, there in self._split(indices):
            yield from inner.members(there)

    def _split(self, indices: IntArray) -> Iterator[tuple[Node, npt.NDArray[np.bool_], IntArray]]:
        numbers = np.searchsorted(self.ends, indices, side='right')
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            start = self.ends[number - 1] if number else 0
            yield self.inner[number], chosen, indices[chosen] - start


class Drawn(Joined):
    """Several data sets, of which an index draws a sample anew every time (``sample_ratio_factor``)."""

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        raise SampleIdError(
            'CombinedDataset with sample_ratio_factor draws its samples while it loads them: which they are cannot be '
            'known before. Leave sample_ratio_factor out, and repeat the data sets that shall count for more:\n'
            "    datasets=[dict(type='RepeatDataset', times=3, dataset=...), ...]"
        )

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        return super().members(np.arange(self.ends[-1]))


class TreeBuilder:
    """Builds the tree of a data set; one that is in it twice gets one leaf."""

    def __init__(self) -> None:
        self._leaves: dict[tuple[int, tuple[str, ...] | None], Leaf] = {}

    def build(self, dataset: Any, packed: tuple[str, ...] | None = None) -> Node:
        """The node of ``dataset``, of whose annotations a pipeline around it packs the fields ``packed``."""
        if isinstance(dataset, IndexedDataset):
            if packed is not None and 'sample_key' not in packed:
                return self.build(dataset.dataset, packed)
            return _renamed(self._leaf(dataset, None), dataset.dataset)
        if isinstance(dataset, (RepeatDataset, ClassBalancedDataset, Subset)):
            return Renamed(self.build(dataset.dataset, packed), _rename(dataset))
        if _is_a(dataset, '_SlicedDataset', 'mmengine'):
            source = dataset._dataset
            return Sliced(self.build(source, packed), len(source), _is_endless(source))
        combined = _is_a(dataset, 'CombinedDataset', 'mmpose')
        if combined or isinstance(dataset, ConcatDataset):
            packed = packed or (meta_keys(dataset.pipeline) if combined else None)
            inner = [self.build(member, packed) for member in dataset.datasets]
            lengths = [len(member) for member in dataset.datasets]
            return (Drawn if combined and dataset.resample else Joined)(inner, lengths)
        return self._leaf(dataset, packed)

    def _leaf(self, dataset: Any, packed: tuple[str, ...] | None) -> Leaf:
        place = id(dataset), packed
        if place not in self._leaves:
            self._leaves[place] = leaf_of(dataset, packed)
        return self._leaves[place]


def _renamed(leaf: Leaf, dataset: Any) -> Node:
    """``leaf``, seen through the data sets around ``leaf.dataset`` that repeat its samples, down from ``dataset``."""
    if dataset is leaf.dataset:
        return leaf
    return Renamed(_renamed(leaf, dataset.dataset), _rename(dataset))


def _rename(dataset: Any) -> Callable[[IntArray], IntArray]:
    """The indices in the inner data set of a ``RepeatDataset``, ``ClassBalancedDataset`` or ``Subset``."""
    if isinstance(dataset, RepeatDataset):
        length = len(dataset.dataset)
        return lambda indices: indices % length
    chosen = dataset.indices if isinstance(dataset, Subset) else dataset.repeat_indices
    return np.asarray(chosen, dtype=np.int64).__getitem__


def _is_endless(dataset: Any) -> bool:
    """Whether it loads a sample for indices beyond its length, too, as ``RepeatDataset`` does."""
    while isinstance(dataset, IndexedDataset):
        dataset = dataset.dataset
    return isinstance(dataset, RepeatDataset)


def _is_a(dataset: Any, name: str, package: str) -> bool:
    """Whether it is of a class that is not imported for that: not every installation, or version, has it."""
    return any(cls.__name__ == name and cls.__module__.startswith(f'{package}.') for cls in type(dataset).__mro__)
