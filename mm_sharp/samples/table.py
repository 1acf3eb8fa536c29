"""Columns of (id, average, visits) sorted by id: what a sample history keeps for one data set (ours).

Three arrays of 14 bytes a sample together, whatever the ids are, and a small unsorted-in part for new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_BLOCK = 1 << 18
_RANGE = 1 << 20
_MOST_VISITS = int(np.iinfo(np.uint16).max)
_FIELDS = {'ids': torch.int64, 'averages': torch.float32, 'visits': torch.int16}


class Columns:
    """Ids in increasing order, with averages and visits: 14 bytes a sample."""

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int64)
        self.averages = np.empty(0, np.float32)
        self.visits = np.empty(0, np.uint16)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Row of each id, and whether it is there at all (if not, the row is any)."""
        if not len(self):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return rows, self.ids[rows] == ids

    def insert(self, ids: IntArray, averages: npt.NDArray[Any], visits: npt.NDArray[Any]) -> None:
        """Sort new samples in, in place: the arrays are lengthened and moved up from behind, a block at a time."""
        before = np.searchsorted(self.ids, ids)
        stop, first = len(self), int(before[0]) if len(before) else len(self)
        # No views of these arrays leave this class, so their memory may move.
        for column in (self.ids, self.averages, self.visits):
            column.resize(len(column) + len(ids), refcheck=False)
        while stop > first:
            start = max(first, stop - _BLOCK)
            below, above = np.searchsorted(before, (start, stop))
            gaps = np.bincount(before[below:above] - start, minlength=stop - start)
            rows = np.arange(start, stop) + below + np.cumsum(gaps)
            for column in (self.ids, self.averages, self.visits):
                column[rows] = column[start:stop].copy()
            stop = start
        rows = before + np.arange(len(ids))
        self.ids[rows], self.averages[rows], self.visits[rows] = ids, averages, visits

    def select(self, rows: npt.NDArray[np.bool_]) -> None:
        """Keep only the rows that are marked."""
        self.ids, self.averages, self.visits = self.ids[rows], self.averages[rows], self.visits[rows]


class Table:
    """The samples of one data set: sorted ones, and a few recent ones, so that not every new sample moves all."""

    def __init__(self) -> None:
        self._main = Columns()
        self._recent = Columns()

    def __len__(self) -> int:
        return len(self._main) + len(self._recent)

    @property
    def nbytes(self) -> int:
        return sum(c.ids.nbytes + c.averages.nbytes + c.visits.nbytes for c in (self._main, self._recent))

    def look_up(self, ids: IntArray) -> tuple[FloatArray, IntArray]:
        """Averages and visits; both 0 where there are none."""
        averages, visits = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
        for columns in (self._main, self._recent):
            rows, found = columns.find(ids)
            averages[found] = columns.averages[rows[found]]
            visits[found] = columns.visits[rows[found]]
        return averages, visits

    def add(self, ids: IntArray, means: npt.NDArray[Any], visits: npt.NDArray[Any], momentum: float | None) -> None:
        """Add to each of ``ids`` (increasing) its number of visits with their mean."""
        for columns in (self._main, self._recent):
            rows, found = columns.find(ids)
            rows, new = rows[found], visits[found].astype(np.int64)
            old = columns.visits[rows].astype(np.int64)
            columns.averages[rows] = blend(columns.averages[rows], old, means[found], new, momentum)
            columns.visits[rows] = np.minimum(old + new, _MOST_VISITS)
            ids, means, visits = ids[~found], means[~found], visits[~found]
        self._recent.insert(ids, means, np.minimum(visits, _MOST_VISITS))
        if len(self._recent) > max(4096, len(self._main) // 64):
            self._settle()

    def keep(self, ids: IntArray) -> None:
        """Drop the samples that are not among ``ids`` (increasing)."""
        self._settle()
        if len(ids):
            rows = np.minimum(np.searchsorted(ids, self._main.ids), len(ids) - 1)
            self._main.select(ids[rows] == self._main.ids)
        else:
            self._main = Columns()

    def columns(self) -> tuple[IntArray, npt.NDArray[np.float32], npt.NDArray[np.uint16]]:
        """Ids (increasing), averages and visits: the table's own arrays, which its next change may move."""
        self._settle()
        return self._main.ids, self._main.averages, self._main.visits

    def all_ids(self) -> IntArray:
        return np.concatenate([self._main.ids, self._recent.ids])

    def sum(self) -> float:
        """Sum of all averages."""
        return float(sum(c.averages.sum(dtype=np.float64) for c in (self._main, self._recent)))

    def export(self) -> dict[str, torch.Tensor]:
        """The columns as tensors; visits as int16, for torch's older versions have no unsigned ones."""
        ids, averages, visits = self.columns()
        copies: tuple[npt.NDArray[Any], ...] = (ids.copy(), averages.copy(), visits.view(np.int16).copy())
        return dict(zip(_FIELDS, map(torch.from_numpy, copies), strict=True))

    @classmethod
    def read(cls, name: str, fields: Mapping[str, torch.Tensor]) -> Table:
        """A table of copies of what :meth:`export` gave.

        Raises:
            ValueError: It is not that.
        """
        check_name(name)
        tensors = [fields.get(field) for field in _FIELDS]
        for field, dtype, tensor in zip(_FIELDS, _FIELDS.values(), tensors, strict=True):
            ok = isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.dim() == 1
            if not ok or len(tensor) != len(tensors[0]):  # type: ignore[arg-type]
                raise ValueError(f'The history of data set {name!r} is damaged: {field} must be a {dtype} vector')
        table = cls()
        ids, averages, visits = (tensor.cpu().numpy().copy() for tensor in tensors)  # type: ignore[union-attr]
        visits = visits.view(np.uint16).copy()
        if (ids[1:] <= ids[:-1]).any() or not np.isfinite(averages).all() or (averages < 0).any() or not visits.all():
            raise ValueError(
                f'The history of data set {name!r} is damaged: ids must increase, averages be finite and at least 0, '
                'visits at least 1'
            )
        table._main.ids, table._main.averages, table._main.visits = ids, averages, visits
        return table

    def _settle(self) -> None:
        """Sort the recent samples in among the others."""
        recent, self._recent = self._recent, Columns()
        self._main.insert(recent.ids, recent.averages, recent.visits)


def blend(
    averages: npt.NDArray[Any], visits: IntArray, means: npt.NDArray[Any], new: IntArray, momentum: float | None
) -> FloatArray:
    """The averages after ``new`` more visits of mean ``means``."""
    # Both weights are computed by themselves, and no difference of averages is taken: averages of very different size
    # would cancel.
    if momentum is None:
        kept, added = visits.astype(np.float64), new.astype(np.float64)
    else:
        past = momentum**new
        kept, added = past * (1.0 - momentum**visits), 1.0 - past
    whole = kept + added
    whole[whole == 0] = 1.0
    result: FloatArray = kept / whole * averages.astype(np.float64) + added / whole * means
    return result


def joined(tables: Sequence[Table]) -> Iterator[tuple[IntArray, FloatArray, IntArray]]:
    """Ids (increasing), mean and number of the visits of several tables, whatever their order; by ranges of ids."""
    all_columns = [table.columns() for table in tables]
    # A range holds at most so many samples of each table: sorting all at once would take some 90 bytes a sample.
    edges = np.unique(np.concatenate([ids[_RANGE::_RANGE] for ids, _, _ in all_columns]))
    cuts = [[0, *np.searchsorted(ids, edges), len(ids)] for ids, _, _ in all_columns]
    for part in range(len(edges) + 1):
        rows = [slice(cut[part], cut[part + 1]) for cut in cuts]
        pieces = [[column[r] for column in columns] for columns, r in zip(all_columns, rows, strict=True)]
        ids, means, visits = (np.concatenate(column) for column in zip(*pieces, strict=True))
        # Floating-point sums depend on their order, so that is made the same for every order of the tables.
        order = np.lexsort((means, visits, ids))
        ids, means, visits = ids[order], means[order].astype(np.float64), visits[order].astype(np.int64)
        if len(ids):
            starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
            totals = np.add.reduceat(visits, starts)
            yield ids[starts], np.add.reduceat(means * visits, starts) / totals, totals


def check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"The data set's name {name!r} is not allowed: it must be a string")
