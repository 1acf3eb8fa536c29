"""Data sets that have samples of their own, and what is known of these before they are loaded (ours)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from mmengine.dataset import BaseDataset

from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import Key, SampleIdError, id_field, key_of, unidentified

IntArray = npt.NDArray[np.int64]

# What keys are read from in a batch without data samples.
_DICT_FIELDS = ('sample_key', 'sample_idx', 'dataset_name')


class Leaf(ABC):
    """A data set with samples of its own.

    Args:
        dataset: The data set; of an ``IndexedDataset`` the one in it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def locate(self, rows: IntArray, indices: IntArray) -> Iterator[tuple[Leaf, IntArray, IntArray]]:
        """Indices lead no further."""
        yield self, rows, indices

    def members(self, indices: IntArray) -> Iterator[tuple[Leaf, IntArray]]:
        """Indices lead no further."""
        yield self, indices

    @property
    def title(self) -> str:
        """What to call it in a message."""
        file = getattr(self.dataset, 'ann_file', None)
        return f'{type(self.dataset).__name__} of {file}' if file else type(self.dataset).__name__

    @property
    @abstractmethod
    def labelling(self) -> object:
        """What makes keys of samples: leaves that differ in it give the same sample different keys."""

    @abstractmethod
    def keys(self, indices: IntArray) -> list[Key]:
        """The keys of the samples at these indices."""

    @abstractmethod
    def ids_by_name(self, indices: IntArray) -> dict[str, IntArray]:
        """The ids of the samples at these indices, by the data set's name in their keys."""

    @abstractmethod
    def id_field(self) -> str:
        """What the ids are: ``'id'``, ``'img_id'`` or ``'sample_idx'`` (of its first sample), or ``'index'``."""


class Indexed(Leaf):
    """The data set in an ``IndexedDataset``: the index is the id.

    Args:
        dataset: The data set, without those around it that repeat its samples.
        name: The name that ``IndexedDataset`` gives it.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(dataset)
        self._name = name

    @property
    def labelling(self) -> object:
        return Indexed, self._name

    def keys(self, indices: IntArray) -> list[Key]:
        return [(self._name, index) for index in indices.tolist()]

    def ids_by_name(self, indices: IntArray) -> dict[str, IntArray]:
        return {self._name: indices}

    def id_field(self) -> str:
        return 'index'


class Annotated(Leaf):
    """A data set that says what its samples are; each is read once and remembered in 12 bytes.

    Args:
        dataset: The data set.
        packed: Which fields of an annotation a batch will show; None for all.
    """

    def __init__(self, dataset: Any, packed: tuple[str, ...] | None) -> None:
        super().__init__(dataset)
        self._packed = packed
        self._annotation = _reader(dataset)
        # Of zeros, pages of memory are taken when they are written to. Row 0: not read yet.
        self._ids = np.zeros(len(dataset), np.int64)
        self._name_rows = np.zeros(len(dataset), np.int32)
        self._names: list[str] = ['']

    @property
    def labelling(self) -> object:
        info = getattr(self.dataset, 'metainfo', None)
        return Annotated, self._packed, info.get('dataset_name') if isinstance(info, Mapping) else None

    def keys(self, indices: IntArray) -> list[Key]:
        self._fill(indices)
        rows, ids = self._name_rows[indices].tolist(), self._ids[indices].tolist()
        return [(self._names[row], number) for row, number in zip(rows, ids, strict=True)]

    def ids_by_name(self, indices: IntArray) -> dict[str, IntArray]:
        self._fill(indices)
        rows, ids = self._name_rows[indices], self._ids[indices]
        return {self._names[row]: ids[rows == row] for row in np.unique(rows)}

    def id_field(self) -> str:
        return id_field(self._shown(self._annotation(0)))

    def _fill(self, indices: IntArray) -> None:
        for index in np.unique(indices[self._name_rows[indices] == 0]).tolist():
            name, self._ids[index] = self._read(index)
            if name not in self._names[1:]:
                self._names.append(name)
            self._name_rows[index] = self._names.index(name, 1)

    def _read(self, index: int) -> Key:
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


def leaf_of(dataset: Any, packed: tuple[str, ...] | None) -> Leaf:
    """The leaf for a data set.

    Args:
        dataset: It.
        packed: The fields of its annotations that a pipeline around it packs; None if there is none that packs.
    """
    if isinstance(dataset, IndexedDataset):
        return Indexed(dataset.source, dataset.name)
    return Annotated(dataset, packed or _shown_fields(dataset))


def meta_keys(pipeline: Any) -> tuple[str, ...] | None:
    """The ``meta_keys`` of the transform that packs data samples (``PackPoseInputs`` and the like), if there is one."""
    transforms = getattr(pipeline, 'transforms', pipeline)
    listed = transforms if isinstance(transforms, (list, tuple)) else []
    keys = (getattr(transform, 'meta_keys', None) for transform in reversed(listed))
    return next((tuple(found) for found in keys if found), None)


def _shown_fields(dataset: Any) -> tuple[str, ...] | None:
    """The fields of an annotation by which a batch will identify its sample; None if nothing selects among them."""
    while dataset is not None:
        pipeline = getattr(dataset, 'pipeline', None)
        if pipeline is not None:
            return meta_keys(pipeline) or _DICT_FIELDS
        dataset = getattr(dataset, 'dataset', None)
    return None


def _reader(dataset: Any) -> Callable[[int], dict[str, Any]]:
    """The function that gives the annotation of a sample."""
    if _is_around_indexed(dataset):
        return _no_place
    reader = getattr(dataset, 'get_data_info', None)
    if not callable(reader):
        return _no_annotation
    definer = next((cls for cls in type(dataset).__mro__ if 'get_data_info' in vars(cls)), None)
    if definer is not None and definer.__name__ == 'BaseCocoStyleDataset' and isinstance(dataset, BaseDataset):
        # MMPose's own copies flip pairs, skeleton and so on into every annotation: six times the work.
        name = dataset.metainfo['dataset_name']
        return lambda index: {**BaseDataset.get_data_info(dataset, index), 'dataset_name': name}
    return reader  # type: ignore[no-any-return]


def _is_around_indexed(dataset: Any) -> bool:
    """Whether there is an ``IndexedDataset`` in ``dataset``, at any depth."""
    if isinstance(dataset, IndexedDataset):
        return True
    several = getattr(dataset, 'datasets', None)
    inner = [getattr(dataset, name, None) for name in ('dataset', '_dataset')]
    inner += several if isinstance(several, (list, tuple)) else []
    return any(hasattr(member, '__getitem__') and _is_around_indexed(member) for member in inner)


def _no_place(index: int) -> dict[str, Any]:
    # Its get_data_info, often only passed on from within, knows nothing of the keys that IndexedDataset adds.
    raise SampleIdError(
        'it has an IndexedDataset in it, but which sample of that an index leads to is not known. Put the '
        'IndexedDataset around it rather than in it'
    )


def _no_annotation(index: int) -> dict[str, Any]:
    raise SampleIdError('it has no get_data_info(index), which says what a sample is before it is loaded')
