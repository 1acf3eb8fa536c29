"""Average loss difference of every sample of the data set: the scores that AUSAM samples by.

A score is the average over a sample's visits of ``|l_i(w + e) - l_i(w)|`` (ADLP; Deng et al., AAAI 2025, arXiv
2406.08001). The exponential average, without bias at its start, and the exchange between ranks are ours. Visits without
an order among them, of one :meth:`SampleHistory.update` or of several ranks, count as so many visits of their mean; by
:func:`mm_sharp.samples.table.blend`. Memory: 14 bytes a sample, 14 more for each seen since the last exchange.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.samples.table import FloatArray, IntArray, Table, blend

Keys = Sequence[tuple[str, int]]

_VERSION = 1
_NOTHING = Table()
_EXCHANGED_AT_ONCE = 1 << 20
_LARGEST = float(np.finfo(np.float32).max)


class SampleHistory:
    """Average absolute loss difference per sample, keyed by (data set's name, id), any 64-bit integer.

    An average is kept over at most 65,535 visits: from there on a visit weighs as much as the 65,535th did. Not for
    several threads at once.

    Args:
        momentum: Weight of the past in an exponential average, in [0, 1); None for the average over all visits.
        distributed: Keep what this process gathers separate until :meth:`merge`. For one process leave it off.
    """

    def __init__(self, momentum: float | None = None, *, distributed: bool = False) -> None:
        self.momentum = momentum
        self.distributed = distributed
        self._shared: dict[str, Table] = {}
        self._own: dict[str, Table] = {}

    def scores(self, keys: Keys) -> FloatArray:
        """The average of each of N samples, in units of the loss, (N,), float64; NaN where it was never seen."""
        scores = np.empty(len(keys))
        for name, rows, ids in _by_data_set(keys):
            scores[rows] = self.scores_of(name, ids)
        return scores

    def scores_of(self, name: str, ids: npt.ArrayLike) -> FloatArray:
        """:meth:`scores` of samples of one data set, given the ids alone, shape (N,)."""
        averages, visits = self._look_up(name, np.asarray(ids, np.int64))
        averages[visits == 0] = math.nan
        return averages

    def update(self, keys: Keys, differences: npt.ArrayLike) -> None:
        """Add a visit with the size of ``l_i(w + e) - l_i(w)``, (N,), for each key; not finite ones are ignored."""
        values = np.asarray(differences)
        for name, rows, ids in _by_data_set(keys):
            self.update_of(name, ids, values[rows])

    def update_of(self, name: str, ids: npt.ArrayLike, differences: npt.ArrayLike) -> None:
        """:meth:`update` for samples of one data set, given the ids alone, shape (N,)."""
        values = np.abs(np.asarray(differences, np.float64))
        finite = values <= _LARGEST
        numbers, values = np.asarray(ids, np.int64)[finite], values[finite]
        if not len(numbers):
            return
        order = numbers.argsort(kind='stable')
        increasing, means, visits = numbers[order], values[order], np.ones(len(numbers), np.int64)
        if not (increasing[1:] > increasing[:-1]).all():  # a sample more than once
            increasing, group, visits = np.unique(numbers, return_inverse=True, return_counts=True)
            means = np.bincount(group, values) / visits
        tables = self._own if self.distributed else self._shared
        # Exactly str: torch.load(weights_only=True) refuses numpy's subclass of it.
        tables.setdefault(str(name), Table()).add(increasing, means, visits, self.momentum)

    def pending(self) -> dict[str, dict[str, torch.Tensor]]:
        """What this process of a distributed history gathered since the last exchange, for the others; by name."""
        return {name: table.export() for name, table in self._own.items()}

    def merge(self, gathered: Sequence[Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        """Add every rank's :meth:`pending`, in one order: all hold the same again, bit for bit, if they did before."""
        for name in sorted({name for part in gathered for name in part}):
            columns = [Table.read(part[name]).columns() for part in gathered if name in part]
            shared = self._shared.setdefault(name, Table())
            every = np.unique(np.concatenate([ids for ids, _, _ in columns]))
            for start in range(0, len(every), _EXCHANGED_AT_ONCE):  # all at once would take some 100 bytes a sample
                ids = every[start : start + _EXCHANGED_AT_ONCE]
                sums, counts = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
                for theirs, averages, visits in columns:
                    part = slice(theirs.searchsorted(ids[0]), theirs.searchsorted(ids[-1], side='right'))
                    rows = ids.searchsorted(theirs[part])
                    sums[rows] += averages[part].astype(np.float64) * visits[part]
                    counts[rows] += visits[part]
                shared.add(ids, sums / counts, counts, self.momentum)
        self._own = {}

    def __len__(self) -> int:
        """Samples seen."""
        own = [self._shared.get(name, _NOTHING).look_up(t.columns().ids)[1] for name, t in self._own.items()]
        return sum(map(len, self._shared.values())) + sum(int((visits == 0).sum()) for visits in own)

    def state_dict(self) -> dict[str, Any]:
        """The whole history in plain types and tensors (a copy); exchange a distributed one before."""
        data_sets = {name: self._export(name) for name in sorted({*self._shared, *self._own})}
        return {'version': _VERSION, 'momentum': self.momentum, 'data_sets': data_sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the history by what :meth:`state_dict` gave, if need be with a ValueError; ``momentum`` stays."""
        if state.get('version') != _VERSION:
            raise ValueError(f"The history's version is {state.get('version')!r}: this mm_sharp reads {_VERSION}")
        data_sets = state.get('data_sets')
        if not isinstance(data_sets, Mapping):
            raise ValueError("The history's state is damaged: data_sets must be a dict")
        self._shared = {name: Table.read(fields) for name, fields in data_sets.items()}
        self._own = {}

    def _look_up(self, name: str, ids: IntArray) -> tuple[FloatArray, IntArray]:
        """Averages and visits; both 0 where there are none."""
        averages, visits = self._shared.get(name, _NOTHING).look_up(ids)
        if name in self._own:
            means, new = self._own[name].look_up(ids)
            seen = new > 0
            blended = blend(averages[seen], visits[seen], means[seen], new[seen], self.momentum)
            averages[seen] = blended.astype(np.float32)  # as a table rounds: a checkpoint gives the same scores
            visits += new
        return averages, visits

    def _export(self, name: str) -> dict[str, torch.Tensor]:
        """The shared samples with this process's own added."""
        if name not in self._own:
            return self._shared[name].export()
        table = Table.read(self._shared[name].export()) if name in self._shared else Table()
        table.add(*self._own[name].columns(), self.momentum)
        return table.export()


class PendingUpdates:
    """Brings each step's loss differences to the host without waiting, and writes them when the next step begins."""

    def __init__(self, history: SampleHistory) -> None:
        self.history = history
        self._in_flight: tuple[Keys, HostCopy] | None = None

    def add(self, keys: Keys, differences: torch.Tensor | HostCopy) -> None:
        """Record a step's visits: see :meth:`SampleHistory.update`."""
        self.flush()
        self._in_flight = (keys, differences if isinstance(differences, HostCopy) else HostCopy(differences))

    def flush(self) -> None:
        """Write what is in flight into the history; waits for the device only if the copy is not there yet."""
        if self._in_flight is not None:
            keys, copy = self._in_flight
            self.history.update(keys, copy.numpy())
            self._in_flight = None  # only now: a step that fails before loses nothing

    def state_dict(self) -> dict[str, Any]:
        """What is in flight, in plain types and tensors: to write it early would change the draws that come before."""
        if self._in_flight is None:
            return {}
        keys, copy = self._in_flight
        return {'keys': [tuple(key) for key in keys], 'differences': torch.tensor(copy.numpy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what is in flight by what :meth:`state_dict` gave."""
        self._in_flight = None
        if state:
            self.add([(str(name), int(number)) for name, number in state['keys']], state['differences'].cpu())


def _by_data_set(keys: Keys) -> Iterator[tuple[str, slice | IntArray, IntArray]]:
    """For each data set: its name, the positions of its keys, and their ids."""
    names = dict.fromkeys([name for name, _ in keys])
    for name in names:
        # array refuses what is no integer, and is faster than numpy.
        ids = np.array(array('q', [number for other, number in keys if other == name]))
        rows = slice(None) if len(names) == 1 else np.array([r for r, (other, _) in enumerate(keys) if other == name])
        yield name, rows, ids
