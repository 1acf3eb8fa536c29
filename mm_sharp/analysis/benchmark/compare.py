"""From times to quartiles, paired ratios and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_sharp.analysis.tables import columns
from mm_sharp.step.method import Cost


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    def text(self, unit: float = 1.0, form: str = '.2f') -> str:
        """In units of ``unit``."""
        low, median, high = (format(value / unit, form) for value in self)
        return f'{median} ({low} to {high})'


def quartiles(values: Sequence[float] | NDArray[np.float64]) -> Quartiles:
    """Of at least one number, interpolated between neighbours."""
    return Quartiles(*np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)).tolist())


class Row(NamedTuple):
    """What was found about one method: times of a step, and ratios to the base optimizer's in the same round."""

    label: str
    steps: int
    seconds: Quartiles
    ratio: Quartiles
    theoretical: float | None  # what the ratio is in theory
    images_per_second: float
    peak_bytes: int | None = None  # most memory at once

    @property
    def distance(self) -> float | None:
        """How far the ratio is above the theoretical cost, in percent of that."""
        return None if self.theoretical is None else 100 * (self.ratio.median / self.theoretical - 1)

    def figures(self) -> dict[str, Any]:
        """The row under the names that it has in files."""
        figures = {'limit' if key == 'theoretical' else key: value for key, value in self._asdict().items()}
        times = {'seconds': self.seconds._asdict(), 'ratio': self.ratio._asdict()}
        return {**figures, **times, 'distance_percent': self.distance}


def compare(
    times: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost | None],
    batch_size: int,
    steps_before: int = 0,
    peaks: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """One row a method; two for one that makes costlier steps at intervals: its other steps, and whole cycles.

    A cycle's quartiles are means over its steps: those of the other steps and of the costlier one. (A median of few
    whole cycles would take in every disturbance.) All are by method: ``times``, the seconds of each round's step, after
    ``steps_before`` others, in whole cycles; ``costs`` in theory, None where it says nothing; ``peaks``, most bytes.
    """
    rows, base = [], np.asarray(times['base'])
    for name, steps in times.items():
        cost, seconds, peak = costs[name], np.asarray(steps), (peaks or {}).get(name)
        costly = costlier(cost, len(steps), steps_before)
        both = seconds, seconds / base
        most = [quartiles(values[~costly]) for values in both]
        found = [(name, int((~costly).sum()), most, None if cost is None else cost.step)]
        if cost is not None and costly.any():
            pairs = zip(most, (quartiles(values[costly]) for values in both), strict=True)
            mean = [Quartiles(*np.average(pair, 0, [cost.length - 1, 1]).tolist()) for pair in pairs]
            found = [(f'{name}, most steps', *found[0][1:])]
            found.append((f'{name}, cycle of {cost.length}', len(steps), mean, cost.cycle))
        for label, count, (time, ratio), theoretical in found:
            rows.append(Row(label, count, time, ratio, theoretical, batch_size / time.median, peak))
    return rows


def costlier(cost: Cost | None, steps: int, before: int) -> NDArray[np.bool_]:
    """Which of so many steps cost more than most, (steps,): the first of every cycle, given those made before them."""
    length = 1 if cost is None else cost.length
    return np.array([length > 1 and (before + number) % length == 0 for number in range(steps)])


def step_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ('method', 'step, ms (quartiles)', 'ratio (quartiles)', 'theory', 'distance', 'images/s', 'peak, MB')
    lines = [head]
    for row in rows:
        theory = ('', '') if row.theoretical is None else (f'{row.theoretical:.3f}', f'{row.distance:+.1f} %')
        peak = 'n/a' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:.1f}'
        times = row.seconds.text(1e-3), row.ratio.text(form='.3f')
        lines.append((row.label, *times, *theory, f'{row.images_per_second:.1f}', peak))
    return columns(lines)


def run_costs(costs: Mapping[str, Cost | None]) -> str:
    """What whole trainings cost, as text, where the first epoch costs more than the others: else empty."""
    lines = [
        f'{name}: {cost.cycle:.2f} + {cost.first_epoch - cost.cycle:.2f} / epochs over a training: the first epoch '
        f'costs {cost.first_epoch:.2f}'
        for name, cost in costs.items()
        if cost is not None and cost.first_epoch is not None
    ]
    return '\n'.join(lines)
