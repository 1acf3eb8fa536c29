"""The keys of a data set's samples by their index, before any picture is loaded.

What a batch will show of a sample is known beforehand: its annotation, ``get_data_info(index)``, as far as the pipeline
packs it (the ``meta_keys`` of ``PackPoseInputs`` and the like; else ``sample_idx``). One function reads the keys of
both, :func:`mm_sharp.samples.keys.key_of`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from mmengine.dataset import BaseDataset, ClassBalancedDataset, RepeatDataset
from torch.utils.data import ConcatDataset, Subset

from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import Key, SampleIdError, id_field, key_of, unidentified
from mm_sharp.samples.selection import IntArray

MetaKeys = tuple[str, ...]

_DICT_FIELDS = ('sample_key', 'sample_idx', 'dataset_name')  # what keys are read from in a batch without data samples


class DatasetKeys:
    """Keys of the samples of a data set, as the data loader has it, each read once, on first demand, and remembered.

    It knows ``IndexedDataset``, MMEngine's, torch's and MMPose's data sets that are made of others, one in another at
    any depth, what ``num_batch_per_epoch`` leaves, and every data set with a ``get_data_info(index)`` that wraps no
    other. Methods that read keys raise a ``SampleIdError`` for the rest.
    """

    def __init__(self, dataset: Any) -> None:
        if callable(getattr(dataset, 'full_init', None)):
            dataset.full_init()
        self._length = len(dataset)
        if _is_a(dataset, '_SlicedDataset'):
            dataset = dataset._dataset
            self._length = min(self._length, len(dataset))
        self._dataset = dataset
        self._leaves: dict[tuple[int, MetaKeys | None], _Leaf] = {}

    def keys(self, indices: Sequence[int] | IntArray) -> list[Key]:
        """The keys of the samples that ``dataset[i]`` loads for each i of ``indices``, in their order."""
        places = np.asarray(indices, dtype=np.int64)
        found: list[Key] = [('', 0)] * len(places)
        for leaf, rows, inner in self._locate(self._dataset, np.arange(len(places)), places):
            for row, key in zip(rows.tolist(), leaf.keys(inner), strict=True):
                found[row] = key
        return found

    def count(self) -> int:
        """How many different samples can be loaded, by objects, annotation files and what is selected from them."""
        return sum(len(places) for _, places in self._members())

    def check_collisions(self) -> None:
        """Refuse combined data sets of which different samples have the same key, with a ``SampleIdError``.

        Ids are compared where data sets share the name of their first sample, and are not of one annotation file.
        """
        groups: dict[str, list[tuple[_Leaf, IntArray]]] = {}
        members = self._members()
        for leaf, places in members if len(members) > 1 else []:
            try:
                ((name, _),) = leaf.keys(places[:1])
            except SampleIdError:
                continue
            groups.setdefault(name, []).append((leaf, places))
        for name, group in groups.items():
            for (one, ones), (other, others) in combinations(group, 2):
                if one.origin() != other.origin():
                    shared = np.intersect1d(one.ids_by_name(ones)[name], other.ids_by_name(others)[name])
                    if len(shared):
                        raise SampleIdError(_COLLISION.format(len(shared), name, shared[:3].tolist(), one, other))

    def _members(self) -> list[tuple[_Leaf, IntArray]]:
        """The data sets that have samples of their own, each with those indices of it that can be loaded."""
        found: dict[object, tuple[_Leaf, list[IntArray]]] = {}
        everything = np.arange(self._length)
        for leaf, _, places in self._locate(self._dataset, everything, everything, every=True):
            if len(places):
                found.setdefault(leaf.contents, (leaf, []))[1].append(places)
        return [(leaf, np.unique(np.concatenate(places))) for leaf, places in found.values()]

    def _locate(
        self, dataset: Any, rows: IntArray, indices: IntArray, packed: MetaKeys | None = None, every: bool = False
    ) -> Iterator[tuple[_Leaf, IntArray, IntArray]]:
        """Follow indices of ``dataset`` to data sets that have samples of their own: yields these, rows, indices there.

        ``packed`` is what a pipeline around ``dataset`` packs. With ``every`` the indices stand for all samples.
        """
        if isinstance(dataset, IndexedDataset) and (packed is None or 'sample_key' in packed):
            for repeating in dataset.repeating():
                indices = _inner_indices(repeating, indices)
            yield self._leaf(dataset, None), rows, indices
        elif isinstance(dataset, (IndexedDataset, RepeatDataset, ClassBalancedDataset, Subset)):
            yield from self._locate(dataset.dataset, rows, _inner_indices(dataset, indices), packed, every)
        elif isinstance(dataset, ConcatDataset) or _is_a(dataset, 'CombinedDataset'):
            packed = packed or _meta_keys(getattr(dataset, 'pipeline', None))
            ends = np.cumsum([len(member) for member in dataset.datasets])
            if getattr(dataset, 'resample', False):
                if not every:
                    raise SampleIdError(_DRAWN_WHILE_LOADING)
                rows = indices = np.arange(ends[-1])
            numbers = ends.searchsorted(indices, side='right')
            for number in np.unique(numbers).tolist():
                chosen = numbers == number
                inner = indices[chosen] - (ends[number - 1] if number else 0)
                yield from self._locate(dataset.datasets[number], rows[chosen], inner, packed, every)
        else:
            yield self._leaf(dataset, packed), rows, indices

    def _leaf(self, dataset: Any, packed: MetaKeys | None) -> _Leaf:
        place = id(dataset), packed
        return self._leaves.get(place) or self._leaves.setdefault(place, _Leaf(dataset, packed))


class _Leaf:
    """A data set with samples of its own, or an ``IndexedDataset``; each key is read once and kept in 12 bytes."""

    def __init__(self, dataset: Any, packed: MetaKeys | None) -> None:
        self.indexed = isinstance(dataset, IndexedDataset)
        self.dataset = dataset.source if isinstance(dataset, IndexedDataset) else dataset
        pipeline = getattr(self.dataset, 'pipeline', None)
        self._packed = packed or (None if pipeline is None else _meta_keys(pipeline) or _DICT_FIELDS)
        info = getattr(self.dataset, 'metainfo', None)
        self._dataset_name = info.get('dataset_name') if isinstance(info, Mapping) else None
        # Of zeros, pages of memory are taken when they are written to. Row 0: not read yet.
        self._names = ['', dataset.name] if self.indexed else ['']
        self._name_rows = np.zeros(0 if self.indexed else len(dataset), np.int32)
        self._ids = np.zeros(len(self._name_rows), np.int64)
        self.file = str(getattr(self.dataset, 'ann_file', None) or '')
        # Equal for data sets with the same samples, and with the same keys of them, as far as their settings tell.
        chosen = [getattr(self.dataset, field, None) for field in ('_indices', 'filter_cfg', 'test_mode', 'data_mode')]
        same_file = type(self.dataset), self.file, len(self.dataset), repr(chosen)
        self.samples = same_file if self.file else id(self.dataset)
        self.contents = self.samples, (dataset.name if self.indexed else (self._packed, self._dataset_name))

    def keys(self, indices: IntArray) -> list[Key]:
        rows, ids = self._columns(indices)
        return [(self._names[row], number) for row, number in zip(rows.tolist(), ids.tolist(), strict=True)]

    def ids_by_name(self, indices: IntArray) -> dict[str, IntArray]:
        rows, ids = self._columns(indices)
        return {self._names[row]: ids[rows == row] for row in np.unique(rows)}

    def origin(self) -> tuple[object, ...]:
        """Equal for data sets whose equal ids mean the same sample."""
        field = 'index' if self.indexed else id_field(self._shown(self._annotation(0)))
        # An index counts what is left of the annotations after everything that selects from them.
        return field, (self.file if self.file and field in ('id', 'img_id') else self.samples)

    def _columns(self, indices: IntArray) -> tuple[npt.NDArray[np.int32], IntArray]:
        if self.indexed:
            return np.ones(len(indices), np.int32), indices
        for index in set(indices[self._name_rows[indices] == 0].tolist()):
            name, self._ids[index] = self._read(index)
            if name not in self._names[1:]:
                self._names.append(name)
            self._name_rows[index] = self._names.index(name, 1)
        return self._name_rows[indices], self._ids[indices]

    def _read(self, index: int) -> Key:
        try:
            annotation = self._annotation(index)
            fields = self._shown(annotation)
            if id_field(fields) == 'img_id' and 'id' not in fields and id_field(annotation) == 'id':
                raise SampleIdError("'id' is missing, and several samples may have the same 'img_id'")
            return key_of(fields)
        except SampleIdError as error:
            shown = '' if self._packed is None else f', of which a batch will show at most {sorted(self._packed)}'
            raise unidentified('mm_sharp', f'{self}{shown}', error) from error

    def _annotation(self, index: int) -> dict[str, Any]:
        reader = getattr(self.dataset, 'get_data_info', None)
        if not callable(reader) or any(hasattr(self.dataset, inner) for inner in ('dataset', '_dataset', 'datasets')):
            raise SampleIdError('it has no get_data_info(index) of its own, which tells a sample before it is loaded')
        if getattr(reader, '__qualname__', '') == 'BaseCocoStyleDataset.get_data_info':
            # MMPose's own copies flip pairs, skeleton and so on into every annotation: four times the work.
            return {**BaseDataset.get_data_info(self.dataset, index), 'dataset_name': self._dataset_name}
        return reader(index)  # type: ignore[no-any-return]

    def _shown(self, annotation: dict[str, Any]) -> dict[str, Any]:
        packed = annotation if self._packed is None else self._packed
        return {field: annotation[field] for field in packed if field in annotation}

    def __str__(self) -> str:
        return f'{type(self.dataset).__name__} of {self.file}' if self.file else type(self.dataset).__name__


def _meta_keys(pipeline: Any) -> MetaKeys | None:
    """The ``meta_keys`` of the transform that packs data samples (``PackPoseInputs`` and the like), if there is one."""
    found = [step.meta_keys for step in getattr(pipeline, 'transforms', []) if getattr(step, 'meta_keys', None)]
    return tuple(found[-1]) if found else None


def _inner_indices(dataset: Any, indices: IntArray) -> IntArray:
    """The indices in the data set within."""
    if isinstance(dataset, IndexedDataset):
        return indices
    if isinstance(dataset, RepeatDataset):
        return indices % len(dataset.dataset)
    chosen = dataset.indices if isinstance(dataset, Subset) else dataset.repeat_indices
    return np.array([chosen[index] for index in indices.tolist()], np.int64)


def _is_a(dataset: Any, name: str) -> bool:
    """Whether it is of a class that not every installation, or version, has."""
    return any(cls.__name__ == name for cls in type(dataset).__mro__)


_DRAWN_WHILE_LOADING = (
    'CombinedDataset with sample_ratio_factor draws its samples while it loads them: which they are cannot be known '
    "before. Leave it out, and repeat what shall count for more: dict(type='RepeatDataset', times=3, dataset=...)"
)
_COLLISION = (
    '{} samples of two combined data sets have the same name {!r} and the same ids ({}, ...), so each would change the '
    'score of the other: {} and {}. Give each data set a name of its own:\n'
    "    datasets=[dict(type='IndexedDataset', name='first', dataset=...),\n"
    "              dict(type='IndexedDataset', name='second', dataset=...)]\n"
    "and, if their samples are packed by a pipeline around them, as CombinedDataset's, pack the key there:\n"
    "    dict(type='PackPoseInputs', meta_keys=('sample_key', ...))"
)
