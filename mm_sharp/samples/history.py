"""Average loss difference of every sample of the data set: the scores that AUSAM samples by.

The score of a sample is the average, over all its visits, of the absolute difference in loss before and after the
perturbation (ADLP; Deng et al., AAAI 2025, arXiv 2406.08001). The exponential average, the exchange between ranks and
the storage are ours.

One formula serves both averages and the exchange. ``C`` visits with mean ``E`` join ``n`` visits with average ``v``::

    (m**C * mass(n) * v + mass(C) * E) / mass(n + C),    mass(n) = n, m = 1     running average
                                                         mass(n) = 1 - m**n     exponential average with momentum m

The exponential average is thus free of bias from its start: after one visit it is that visit's value, and it forgets
the past by ``m`` a visit. PendingUpdates that have no order among them, since they came in one call of
:meth:`SampleHistory.update` or from several ranks between two exchanges, count as ``C`` visits of their mean.

Memory: a data set's ids (int64), averages (float32) and visits (uint16) lie in three arrays sorted by id, whatever the
ids are: 14 bytes a sample, and 1/64 more while new ones wait to be sorted in. The arrays grow in place. A distributed
history holds in addition 14 bytes for each sample that this process saw since the last exchange.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mm_sharp.samples.table import FloatArray, IntArray, Table, blend, check_name, joined

Keys = Sequence[tuple[str, int]]

_VERSION = 1


class Reconciliation(NamedTuple):
    """What :meth:`SampleHistory.reconcile` did, in samples: kept, dropped, and known but never seen."""

    kept: int
    dropped: int
    unseen: int


class HistorySummary(NamedTuple):
    """Samples seen, their share of a given total (None without one), and the mean of their averages (loss units)."""

    seen: int
    share_seen: float | None
    mean_difference: float


class SampleHistory:
    """Average absolute loss difference per sample, keyed by (data set's name, id).

    Ids are any 64-bit integers, dense or sparse. Samples of different data sets never meet; a data set that is repeated
    under one name shares its samples. An average is kept over at most 65,535 visits: from there on a visit weighs as
    much as the 65,535th did. Not for several threads at once.

    Args:
        momentum: Weight of the past in an exponential average, in [0, 1); None for the average over all visits.
        distributed: Keep apart what this process gathers, until :meth:`merge`. For one process leave it off.

    Raises:
        ValueError: ``momentum`` is out of range.
    """

    def __init__(self, momentum: float | None = None, *, distributed: bool = False) -> None:
        number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
        if momentum is not None and not (number and 0 <= momentum < 1):
            raise ValueError(f'momentum={momentum!r} is not allowed: it must be None or a number in [0, 1)')
        self.momentum = None if momentum is None else float(momentum)
        self.distributed = distributed
        self._shared: dict[str, Table] = {}
        self._own: dict[str, Table] = {}
        self._handed_out = True

    # ---------------------------------------------------------------- a mini-batch
    def scores(self, keys: Keys) -> FloatArray:
        """The average of each sample, in units of the loss; NaN where it was never seen.

        Args:
            keys: N pairs of a data set's name and a sample's id.

        Returns:
            Shape (N,), float64 (of float32's values).

        Raises:
            ValueError: A key is no such pair.
        """
        scores = np.empty(len(keys))
        for name, (rows, ids) in _by_data_set(keys).items():
            scores[rows] = self.scores_of(name, ids)
        return scores

    def scores_of(self, name: str, ids: npt.ArrayLike) -> FloatArray:
        """:meth:`scores` of samples of one data set, given the ids alone, shape (N,)."""
        averages, visits = self._look_up(name, _id_array(ids))
        averages[visits == 0] = math.nan
        return averages

    def update(self, keys: Keys, differences: npt.ArrayLike) -> int:
        """Add one visit for each key; one that is repeated counts as often.

        Args:
            keys: N pairs of a data set's name and a sample's id.
            differences: ``l_i(w + e) - l_i(w)``, shape (N,); the sign does not matter.

        Returns:
            How many differences were ignored because they are not finite (in float32).

        Raises:
            ValueError: A key is no such pair, or there are not as many differences as keys. Nothing is changed then.
        """
        values = _magnitudes(differences, len(keys))
        groups = _by_data_set(keys)
        return sum(self._add(name, ids, values[rows]) for name, (rows, ids) in groups.items())

    def update_of(self, name: str, ids: npt.ArrayLike, differences: npt.ArrayLike) -> int:
        """:meth:`update` for samples of one data set, given the ids alone, shape (N,)."""
        check_name(name)
        array = _id_array(ids)
        return self._add(name, array, _magnitudes(differences, len(array)))

    # ---------------------------------------------------------------- ranks
    def pending(self) -> dict[str, dict[str, torch.Tensor]]:
        """What this process gathered since the last exchange, for the others.

        Returns:
            For each data set by name: ``ids`` (int64, increasing), ``averages`` (float32) and ``visits`` (int16, to be
            read as unsigned) of the samples visited. Tensors on the CPU, of their own memory.

        Raises:
            RuntimeError: The history was not made with ``distributed=True``.
        """
        if not self.distributed:
            raise RuntimeError('pending() needs SampleHistory(..., distributed=True): this history keeps nothing apart')
        self._handed_out = True
        return {name: table.export() for name, table in self._own.items()}

    def merge(self, gathered: Sequence[Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        """Add what all ranks gathered; afterwards they hold the same history, bit for bit.

        That holds if they held the same at the last exchange. The order of the ranks does not matter.

        Args:
            gathered: Every rank's :meth:`pending`, this rank's own included.

        Raises:
            RuntimeError: The history was updated after :meth:`pending`; those visits would be lost.
            ValueError: An entry is not what :meth:`pending` gives. Nothing is changed then.
        """
        if not self._handed_out:
            raise RuntimeError('merge() after an update that is not in pending(): call pending() again before')
        names = sorted({name for part in gathered for name in part})
        parts = {name: [Table.read(name, part[name]) for part in gathered if name in part] for name in names}
        for name in names:
            table = self._shared.setdefault(name, Table())
            for ids, means, visits in joined(parts.pop(name)):
                table.add(ids, means, visits, self.momentum)
        self._own = {}

    # ---------------------------------------------------------------- the data set
    def reconcile(self, known: Mapping[str, npt.ArrayLike]) -> Reconciliation:
        """Drop what is not in the data set (any more); what is new in it stays unseen.

        Args:
            known: For each data set by name, the ids of all its samples.

        Returns:
            Counts of samples, for the log.

        Raises:
            ValueError: Ids are not integers. Nothing is changed then.
        """
        data_sets = {name: np.unique(_id_array(ids)) for name, ids in known.items()}
        before = len(self)
        for tables in (self._shared, self._own):
            for name in list(tables):
                tables[name].keep(data_sets.get(name, np.empty(0, np.int64)))
                if not len(tables[name]):
                    del tables[name]
        kept = len(self)
        return Reconciliation(kept, before - kept, sum(map(len, data_sets.values())) - kept)

    def summary(self, total: int | None = None) -> HistorySummary:
        """Figures for the log.

        Args:
            total: Samples of the data set(s), if the share of those seen is wanted.

        Raises:
            ValueError: ``total`` is less than 1.
        """
        if total is not None and total < 1:
            raise ValueError(f'total={total!r} is not allowed: it must be an integer of at least 1, or None')
        seen, added = len(self), 0.0
        for name, table in self._own.items():
            ids = table.all_ids()
            added += float(self._look_up(name, ids)[0].sum() - self._shared_part(name, ids)[0].sum())
        whole = sum(table.sum() for table in self._shared.values()) + added
        return HistorySummary(seen, None if total is None else seen / total, whole / seen if seen else math.nan)

    def __len__(self) -> int:
        """Samples seen."""
        shared = sum(map(len, self._shared.values()))
        return shared + sum(int((self._shared_part(n, t.all_ids())[1] == 0).sum()) for n, t in self._own.items())

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        return sum(table.nbytes for tables in (self._shared, self._own) for table in tables.values())

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """The whole history in plain types and tensors (a copy: 14 bytes a sample).

        Of a distributed history it is this process's view; exchange before saving, or visits of other ranks since the
        last exchange are missing after a resume.
        """
        data_sets = {name: self._combined(name).export() for name in self._names()}
        return {'version': _VERSION, 'momentum': self.momentum, 'data_sets': data_sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the history by what :meth:`state_dict` gave.

        The averages go on under this history's own ``momentum``, should it differ from the state's.

        Raises:
            ValueError: ``state`` is damaged, or of a newer version. Nothing is changed then.
        """
        if state.get('version') != _VERSION:
            raise ValueError(f"The history's version is {state.get('version')!r}: this mm_sharp reads {_VERSION}")
        data_sets = state.get('data_sets')
        if not isinstance(data_sets, Mapping):
            raise ValueError("The history's state is damaged: data_sets must be a dict")
        self._shared = {name: Table.read(name, fields) for name, fields in data_sets.items()}
        self._own = {}
        self._handed_out = True

    # ---------------------------------------------------------------- helpers
    def _add(self, name: str, ids: IntArray, values: FloatArray) -> int:
        finite = np.isfinite(values)
        unique, inverse, visits = np.unique(ids[finite], return_inverse=True, return_counts=True)
        if len(unique):
            means = np.bincount(inverse, weights=values[finite]) / visits
            tables = self._own if self.distributed else self._shared
            # Exactly str: torch.load(weights_only=True) refuses numpy's subclass of it.
            tables.setdefault(str(name), Table()).add(unique, means, visits, self.momentum)
            self._handed_out = not self.distributed
        return len(values) - int(finite.sum())

    def _look_up(self, name: str, ids: IntArray) -> tuple[FloatArray, IntArray]:
        """Averages and visits; both 0 where there are none."""
        averages, visits = self._shared_part(name, ids)
        if name not in self._own:
            return averages, visits
        means, new = self._own[name].look_up(ids)
        # Rounded as a table rounds, so that a checkpoint gives the same scores.
        averages = blend(averages, visits, means, new, self.momentum).astype(np.float32).astype(np.float64)
        return averages, visits + new

    def _shared_part(self, name: str, ids: IntArray) -> tuple[FloatArray, IntArray]:
        return self._shared.get(name, Table()).look_up(ids)

    def _names(self) -> list[str]:
        return sorted({*self._shared, *self._own})

    def _combined(self, name: str) -> Table:
        """The shared samples with this process's own added; not to be changed."""
        if name not in self._own or name not in self._shared:
            return self._shared[name] if name in self._shared else self._own[name]
        table = Table.read(name, self._shared[name].export())
        table.add(*self._own[name].columns(), self.momentum)
        return table


def _by_data_set(keys: Keys) -> dict[str, tuple[IntArray, IntArray]]:
    """Positions and ids of the keys of each data set."""
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for row, key in enumerate(keys):
        if not (isinstance(key, tuple) and len(key) == 2):
            raise ValueError(f"keys[{row}]={key!r} is not allowed: it must be a pair like ('coco', 17)")
        name, number = key
        if name not in groups:
            check_name(name)
            groups[name] = ([], [])
        rows, numbers = groups[name]
        rows.append(row)
        numbers.append(number)
    return {name: (np.array(rows), _id_array(numbers)) for name, (rows, numbers) in groups.items()}


def _id_array(ids: npt.ArrayLike) -> IntArray:
    """``ids`` as a vector of int64."""
    allowed = 'it must be a vector of integers from -2**63 to 2**63 - 1'
    if isinstance(ids, list):
        return _id_array(_plain_integers(ids, allowed))
    array = np.asarray(ids)
    if array.ndim != 1 or (array.dtype.kind not in 'iu' and array.size):
        raise ValueError(f'ids is an array of {array.dtype} of shape {array.shape}: {allowed}')
    if array.dtype.kind == 'u' and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f'id {int(array.max())} is not allowed: {allowed}')
    return array.astype(np.int64, copy=False)


def _plain_integers(ids: Iterable[object], allowed: str) -> IntArray:
    try:
        return np.fromiter(map(operator.index, ids), np.int64)  # type: ignore[arg-type]
    except (TypeError, OverflowError) as error:
        raise ValueError(f'ids={ids!r} is not allowed: {allowed}') from error


def _magnitudes(differences: npt.ArrayLike, count: int) -> FloatArray:
    """Absolute values as float32 holds them, infinite where it cannot."""
    values = np.abs(np.asarray(differences, dtype=np.float64))
    if values.shape != (count,):
        raise ValueError(f'differences has shape {values.shape}: it must be ({count},), one for each key')
    with np.errstate(over='ignore', invalid='ignore'):
        return values.astype(np.float32).astype(np.float64)
