"""Columns of (id, average, visits) sorted by id: what a sample history keeps for one data set.

New samples go to a short second part first, so that not every new one moves all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MOST_VISITS = int(np.iinfo(np.uint16).max)


class Columns(NamedTuple):
    """Ids in increasing order (int64), averages (float32) and visits (uint16): 14 bytes a sample."""

    ids: IntArray
    averages: npt.NDArray[Any]
    visits: npt.NDArray[Any]

    def find(self, ids: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """The rows of those of the ids that are there, and which are; not of an empty table."""
        rows = self.ids.searchsorted(ids)
        found = self.ids.take(rows, mode='clip') == ids
        return rows[found], found

    def merged(self, new: Columns) -> Columns:
        """These samples and ``new`` ones, none of which is here."""
        order = np.concatenate([self.ids, new.ids]).argsort(kind='stable')  # linear for two parts that are sorted
        return Columns(*(np.concatenate(pair)[order] for pair in zip(self, new, strict=True)))


class Table:
    """The samples of one data set; it takes over ``columns`` to begin with."""

    def __init__(self, columns: Columns | None = None) -> None:
        self._main = columns or _empty()
        self._recent = _empty()

    def __len__(self) -> int:
        return len(self._main.ids) + len(self._recent.ids)

    def look_up(self, ids: IntArray) -> tuple[FloatArray, IntArray]:
        """Averages and visits; both 0 where there are none."""
        averages, visits = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
        for part in (self._main, self._recent):
            if len(part.ids):
                rows, found = part.find(ids)
                averages[found], visits[found] = part.averages[rows], part.visits[rows]
        return averages, visits

    def add(self, ids: IntArray, means: npt.NDArray[Any], visits: npt.NDArray[Any], momentum: float | None) -> None:
        """Add to each of ``ids`` (increasing) its number of visits with their mean."""
        for part in (self._main, self._recent):
            if len(part.ids):
                rows, found = part.find(ids)
                new = visits[found]
                old = part.visits[rows].astype(np.int64)
                part.averages[rows] = blend(part.averages[rows], old, means[found], new, momentum)
                part.visits[rows] = np.minimum(old + new, _MOST_VISITS)
                if len(rows) == len(ids):
                    return
                ids, means, visits = ids[~found], means[~found], visits[~found]
        visits = np.minimum(visits, _MOST_VISITS).astype(np.uint16)
        self._recent = self._recent.merged(Columns(ids, means.astype(np.float32), visits))
        if len(self._recent.ids) > max(4096, len(self._main.ids) // 64):
            self.columns()

    def columns(self) -> Columns:
        """All samples, the recent ones sorted in among the others: the table's own arrays."""
        if len(self._recent.ids):
            self._main, self._recent = self._main.merged(self._recent), _empty()
        return self._main

    def export(self) -> dict[str, torch.Tensor]:
        """Copies of the columns as tensors; visits as int16, for torch's older versions have no unsigned ones."""
        ids, averages, visits = self.columns()
        copies = (ids.copy(), averages.copy(), visits.view(np.int16).copy())
        return dict(zip(Columns._fields, map(torch.from_numpy, copies), strict=True))

    @classmethod
    def read(cls, fields: Mapping[str, torch.Tensor]) -> Table:
        """A table of copies of what :meth:`export` gave."""
        ids, averages, visits = (fields[field].cpu().numpy().copy() for field in Columns._fields)
        return cls(Columns(ids, averages, visits.view(np.uint16)))


def _empty() -> Columns:
    return Columns(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.uint16))


def blend(
    averages: npt.NDArray[Any], visits: IntArray, means: npt.NDArray[Any], new: IntArray, momentum: float | None
) -> FloatArray:
    """The averages v of n visits after C = ``new`` >= 1 more of mean E = ``means``.

    ``(m**C * mass(n) * v + mass(C) * E) / mass(n + C)`` with ``mass(n) = 1 - m**n``; without momentum, m = 1 and
    ``mass(n) = n``.
    """
    # Both weights are computed by themselves, and no difference of averages is taken: averages of very different size
    # would cancel.
    kept, added = (visits, new) if momentum is None else (momentum**new * (1.0 - momentum**visits), 1.0 - momentum**new)
    whole = kept + added
    result: FloatArray = kept / whole * averages + added / whole * means
    return result
