"""Keys by index, and which combined data sets would share keys (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mm_sharp.samples.dataset_keys.leaves import IntArray, Leaf
from mm_sharp.samples.dataset_keys.tree import TreeBuilder
from mm_sharp.samples.keys import Key, SampleIdError


class DatasetKeys:
    """Keys of the samples of a data set, each read once, on first demand, and remembered.

    It knows :class:`mm_sharp.samples.indexed_dataset.IndexedDataset`, MMEngine's ``ConcatDataset``, ``RepeatDataset``
    and ``ClassBalancedDataset``, the part of a data set that its ``num_batch_per_epoch`` leaves, MMPose's
    ``CombinedDataset``, torch's ``Subset`` and ``ConcatDataset``, one in another at any depth, and every data set that
    has ``get_data_info(index)``. Of any other wrapper around an ``IndexedDataset`` it guesses no key.

    Args:
        dataset: The data set, as the data loader has it.
    """

    def __init__(self, dataset: Any) -> None:
        if callable(getattr(dataset, 'full_init', None)):
            dataset.full_init()
        self.dataset = dataset
        self._tree = TreeBuilder().build(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def keys(self, indices: Sequence[int] | IntArray) -> list[Key]:
        """The keys of the samples that ``dataset[i]`` loads for each i of ``indices``, in their order.

        Raises:
            IndexError: An index is not in [0, len(dataset)), or beyond the samples that are there.
            SampleIdError: The samples cannot be told apart before they are loaded.
        """
        asked = np.asarray(indices, dtype=np.int64)
        outside = asked[(asked < 0) | (asked >= len(self))]
        if len(outside):
            raise IndexError(f'index {outside[0]} is not in [0, {len(self)}), the range of the data set')
        found: list[Key] = [('', 0)] * len(asked)
        for leaf, rows, there in self._tree.locate(np.arange(len(asked)), asked):
            for row, key in zip(rows.tolist(), leaf.keys(there), strict=True):
                found[row] = key
        return found

    def count(self) -> int:
        """How many different samples can be loaded: those that come more than once are counted once.

        No annotation is read. Two data sets are taken to have the same samples if they are one object, or of the same
        class, name, annotation file and selection from it; what overlaps otherwise is counted for each.
        """
        places: dict[tuple[object, ...], IntArray] = {}
        for leaf, found in self._members():
            place = leaf.labelling, *_contents(leaf.dataset)
            places[place] = np.union1d(places[place], found) if place in places else found
        return sum(map(len, places.values()))

    def ids_by_name(self) -> dict[str, IntArray]:
        """For each data set by name, the ids of all its samples, increasing, each once.

        It reads the annotations of every sample that was not asked for before.

        Raises:
            SampleIdError: The samples cannot be told apart before they are loaded.
        """
        parts: dict[str, list[IntArray]] = {}
        for leaf, places in self._members():
            for name, ids in leaf.ids_by_name(places).items():
                parts.setdefault(name, []).append(ids)
        return {name: np.unique(np.concatenate(ids)) for name, ids in parts.items()}

    def check_collisions(self) -> None:
        """Refuse data sets that are combined although different samples of theirs have the same key.

        Ids are compared only where data sets share a name, which is taken to be that of their first sample; the same
        data set, or annotation file, may be there more than once. Data sets without readable keys are left out.

        Raises:
            SampleIdError: Two samples share a key. The message names their data sets.
        """
        groups: dict[str, list[tuple[Leaf, IntArray]]] = {}
        members = [(leaf, places) for leaf, places in self._members() if len(places)]
        if len({id(leaf) for leaf, _ in members}) < 2:
            return
        for leaf, places in members:
            try:
                (name, _), *_ = leaf.keys(places[:1])
            except SampleIdError:
                continue
            groups.setdefault(name, []).append((leaf, places))
        for name, group in groups.items():
            for (one, ones), (other, others) in combinations(group, 2):
                if one is not other and not _same_samples(one, other):
                    _check_disjoint(name, one.ids_by_name(ones), other.ids_by_name(others), one, other)

    def _members(self) -> Iterator[tuple[Leaf, IntArray]]:
        """The data sets within, each with the indices of it that can be loaded."""
        for leaf, places in self._tree.members(np.arange(len(self))):
            yield leaf, np.unique(places)


def _check_disjoint(name: str, ones: dict[str, IntArray], others: dict[str, IntArray], one: Leaf, other: Leaf) -> None:
    empty = np.empty(0, np.int64)
    shared = np.intersect1d(ones.get(name, empty), others.get(name, empty))
    if len(shared):
        raise SampleIdError(
            f'{len(shared)} samples of two combined data sets have the same name {name!r} and the same ids '
            f'({", ".join(map(str, shared[:3]))}, ...), so each would change the score of the other: {one.title} and '
            f'{other.title}. Give each data set a name of its own:\n'
            "    datasets=[dict(type='IndexedDataset', name='first', dataset=...),\n"
            "              dict(type='IndexedDataset', name='second', dataset=...)]\n"
            "and, if their samples are packed by a pipeline around them, as CombinedDataset's, pack the key there:\n"
            "    dict(type='PackPoseInputs', meta_keys=('sample_key', ...))"
        )


def _same_samples(one: Leaf, other: Leaf) -> bool:
    """Whether equal ids of two data sets mean the same sample."""
    return _origin(one) == _origin(other)


def _origin(leaf: Leaf) -> tuple[object, ...]:
    """What the ids of a data set count."""
    field, file = leaf.id_field(), _file(leaf.dataset)
    if file and field in ('id', 'img_id'):
        return field, file
    # An index counts what is left of the annotations after everything that selects from them.
    return field, *_contents(leaf.dataset)


def _contents(dataset: Any) -> tuple[object, ...]:
    """Equal for data sets with the same samples in the same order, as far as their settings tell."""
    file = _file(dataset)
    if not file:
        return (id(dataset),)
    selection = [getattr(dataset, name, None) for name in ('_indices', 'filter_cfg', 'test_mode', 'data_mode')]
    return type(dataset), file, len(dataset), repr(selection)


def _file(dataset: Any) -> str:
    """Its annotation file, ``''`` if it has none."""
    file = getattr(dataset, 'ann_file', None)
    return str(file) if isinstance(file, (str, Path)) else ''
