"""Data sets in data sets: which sample of which of them an index stands for, and what is known of it beforehand (ours).

A tree of nodes follows the wrappers down to its leaves, the data sets that have samples of their own. All index
arithmetic is on arrays; only leaves, which read annotations, go sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from mmengine.dataset import BaseDataset, ClassBalancedDataset, RepeatDataset
from torch.utils.data import ConcatDataset, Subset

from mm_sharp.indexed_dataset import IndexedDataset
from mm_sharp.sample_keys import Key, SampleIdError, id_field, key_of, unidentified

IntArray = npt.NDArray[np.int64]

# What keys are read from in a batch without data samples.
_DICT_FIELDS = ('sample_key', 'sample_idx', 'dataset_name')


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


class Leaf:
    """A data set with samples of its own, whose keys are read once and remembered.

    Args:
        dataset: The data set.
        packed: Which fields of an annotation a batch will show; None for all.
    """

    def __init__(self, dataset: Any, packed: Collection[str] | None) -> None:
        self.dataset = dataset
        self._packed = packed
        # Of zeros, pages of memory are taken when they are written to. Row 0: not read yet.
        self._ids = np.zeros(len(dataset), np.int64)
        self._name_rows = np.zeros(len(dataset), np.int32)
        self._names: list[str] = ['']
        self._annotation = None if isinstance(dataset, IndexedDataset) else _reader(dataset)

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        yield self, rows, indices

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        yield self, indices

    @property
    def title(self) -> str:
        """What to call it in a message."""
        file = getattr(self.dataset, 'ann_file', None)
        return f'{type(self.dataset).__name__} of {file}' if file else type(self.dataset).__name__

    def keys(self, indices: IntArray) -> list[Key]:
        """The keys of the samples at these indices."""
        self._fill(indices)
        rows, ids = self._name_rows[indices].tolist(), self._ids[indices].tolist()
        return [(self._names[row], number) for row, number in zip(rows, ids, strict=True)]

    def ids_by_name(self, indices: IntArray) -> dict[str, IntArray]:
        """The ids of the samples at these indices, by the data set's name in their keys."""
        self._fill(indices)
        rows, ids = self._name_rows[indices], self._ids[indices]
        return {self._names[row]: ids[rows == row] for row in np.unique(rows)}

    def id_field(self) -> str:
        """What the ids are: ``'id'``, ``'img_id'`` or ``'sample_idx'`` (of its first sample), or ``'index'``."""
        return 'index' if self._annotation is None else id_field(self._shown(self._annotation(0)))

    def _fill(self, indices: IntArray) -> None:
        for index in np.unique(indices[self._name_rows[indices] == 0]).tolist():
            name, self._ids[index] = self._read(index)
            if name not in self._names[1:]:
                self._names.append(name)
            self._name_rows[index] = self._names.index(name, 1)

    def _read(self, index: int) -> Key:
        if self._annotation is None:
            key: Key = self.dataset.sample_key(index).key
            return key
        try:
            annotation = self._annotation(index)
            fields = self._shown(annotation)
            if id_field(fields) == 'img_id' and 'id' not in fields and id_field(annotation) == 'id':
                raise SampleIdError("'id' is missing, and several samples may have the same 'img_id'")
            return key_of(fields)
        except SampleIdError as error:
            shown = '' if self._packed is None else f', of which a batch will show at most {sorted(self._packed)}'
            raise unidentified('mm_sharp', self.title + shown, error) from error

    def _shown(self, annotation: dict[str, Any]) -> dict[str, Any]:
        if self._packed is None:
            return annotation
        return {field: annotation[field] for field in self._packed if field in annotation}


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
        self._leaves: dict[tuple[int, Collection[str] | None], Leaf] = {}

    def build(self, dataset: Any, packed: tuple[str, ...] | None = None) -> Node:
        """The node of ``dataset``, of whose annotations a pipeline around it packs the fields ``packed``."""
        if isinstance(dataset, IndexedDataset):
            dropped = packed is not None and 'sample_key' not in packed
            return self.build(dataset.dataset, packed) if dropped else self._leaf(dataset, None)
        if isinstance(dataset, RepeatDataset):
            length = len(dataset.dataset)
            return Renamed(self.build(dataset.dataset, packed), lambda indices: indices % length)
        if isinstance(dataset, (ClassBalancedDataset, Subset)):
            chosen = dataset.indices if isinstance(dataset, Subset) else dataset.repeat_indices
            return Renamed(self.build(dataset.dataset, packed), np.asarray(chosen, dtype=np.int64).__getitem__)
        combined = _is_combined(dataset)
        if combined or isinstance(dataset, ConcatDataset):
            packed = packed or (_meta_keys(dataset.pipeline) if combined else None)
            inner = [self.build(member, packed) for member in dataset.datasets]
            lengths = [len(member) for member in dataset.datasets]
            return (Drawn if combined and dataset.resample else Joined)(inner, lengths)
        return self._leaf(dataset, packed or _shown_fields(dataset))

    def _leaf(self, dataset: Any, packed: tuple[str, ...] | None) -> Leaf:
        place = id(dataset), packed
        if place not in self._leaves:
            self._leaves[place] = Leaf(dataset, packed)
        return self._leaves[place]


def _is_combined(dataset: Any) -> bool:
    """Whether it is MMPose's ``CombinedDataset``, which is not imported for that."""
    return any(
        cls.__name__ == 'CombinedDataset' and cls.__module__.startswith('mmpose.') for cls in type(dataset).__mro__
    )


def _shown_fields(dataset: Any) -> tuple[str, ...] | None:
    """The fields of an annotation by which a batch will identify its sample; None if nothing selects among them."""
    while dataset is not None:
        pipeline = getattr(dataset, 'pipeline', None)
        if pipeline is not None:
            return _meta_keys(pipeline) or _DICT_FIELDS
        dataset = getattr(dataset, 'dataset', None)
    return None


def _meta_keys(pipeline: Any) -> tuple[str, ...] | None:
    """The ``meta_keys`` of the transform that packs data samples (``PackPoseInputs`` and the like), if there is one."""
    transforms = getattr(pipeline, 'transforms', pipeline)
    listed = transforms if isinstance(transforms, (list, tuple)) else []
    keys = (getattr(transform, 'meta_keys', None) for transform in reversed(listed))
    return next((tuple(found) for found in keys if found), None)


def _reader(dataset: Any) -> Callable[[int], dict[str, Any]]:
    """The function that gives the annotation of a sample."""
    reader = getattr(dataset, 'get_data_info', None)
    if not callable(reader):
        return _no_annotation
    definer = next((cls for cls in type(dataset).__mro__ if 'get_data_info' in vars(cls)), None)
    if definer is not None and definer.__name__ == 'BaseCocoStyleDataset' and isinstance(dataset, BaseDataset):
        # MMPose's own copies flip pairs, skeleton and so on into every annotation: six times the work.
        name = dataset.metainfo['dataset_name']
        return lambda index: {**BaseDataset.get_data_info(dataset, index), 'dataset_name': name}
    return reader  # type: ignore[no-any-return]


def _no_annotation(index: int) -> dict[str, Any]:
    raise SampleIdError('it has no get_data_info(index), which says what a sample is before it is loaded')
