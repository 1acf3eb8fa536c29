"""From times to medians, paired ratios and a table (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mm_sharp.analysis.benchmark.methods import StepLimit


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Row:
    """What was found about one method.

    Args:
        label: The method, and which of its steps.
        steps: How many were timed.
        seconds: Of a step.
        ratio: Of a step to the base optimizer's in the same round.
        limit: What the ratio would be by arithmetic; None where arithmetic says nothing.
        images_per_second: At the median.
        peak_bytes: Most memory at once; None where it was not measured.
    """

    label: str
    steps: int
    seconds: Quartiles
    ratio: Quartiles
    limit: float | None
    images_per_second: float
    peak_bytes: int | None = None

    @property
    def distance(self) -> float | None:
        """How far the ratio is above the limit, in percent of the limit."""
        if self.limit is None:
            return None
        return 100 * (self.ratio.median / self.limit - 1)


def compare(
    times: Mapping[str, Sequence[float]],
    limits: Mapping[str, StepLimit | None],
    batch_size: int,
    steps_before: int = 0,
    base: str = 'base',
    peaks: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """One row a method; two for one that makes costlier steps at intervals: its other steps, and whole cycles.

    A cycle's quartiles are means over its steps: ``refresh - 1`` times the common steps' quartile and once that of the
    costlier ones. (A median of few whole cycles would take in every disturbance.)

    Args:
        times: Seconds of each round's step by method; as many for each method.
        limits: By arithmetic, by method; None for one of which arithmetic says nothing.
        batch_size: Samples a step.
        steps_before: Steps that each method had made before: of a cycle, the first step is the costlier one.
        base: The method that the others are compared with.
        peaks: Most bytes at once, by method.

    Raises:
        ValueError: The methods have different numbers of times, or none; or fewer than a cycle takes.
    """
    if len({len(steps) for steps in times.values()}) != 1 or not times[base]:
        raise ValueError('compare needs the same number of times for every method, and at least one')
    rows = []
    for name, steps in times.items():
        seconds, limit = np.asarray(steps, np.float64), limits[name]
        ratios = seconds / np.asarray(times[base], np.float64)
        common = batch_size, (peaks or {}).get(name)
        if limit is None or limit.refresh == 1:
            step = None if limit is None else limit.step
            rows.append(_row(name, len(seconds), quartiles(seconds), quartiles(ratios), step, *common))
            continue
        if len(seconds) < limit.refresh:
            raise ValueError(f'{name}: {len(seconds)} steps are less than a cycle of {limit.refresh}')
        costly = limit.costlier(len(seconds), steps_before)
        between = quartiles(seconds[~costly]), quartiles(ratios[~costly])
        cycle = (
            _mean(limit.refresh, between[0], quartiles(seconds[costly])),
            _mean(limit.refresh, between[1], quartiles(ratios[costly])),
        )
        rows.append(_row(f'{name}, between refreshes', int((~costly).sum()), *between, limit.step, *common))
        rows.append(_row(f'{name}, cycle of {limit.refresh}', len(seconds), *cycle, limit.cycle, *common))
    return rows


def quartiles(values: Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Quartiles:
    """Of at least one number, interpolated between neighbours."""
    return Quartiles(*(float(q) for q in np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))))


def _mean(cycle: int, common: Quartiles, costly: Quartiles) -> Quartiles:
    pairs = zip(astuple(common), astuple(costly), strict=True)
    return Quartiles(*(((cycle - 1) * a + b) / cycle for a, b in pairs))


def _row(
    label: str,
    steps: int,
    seconds: Quartiles,
    ratio: Quartiles,
    limit: float | None,
    batch_size: int,
    peak: int | None,
) -> Row:
    return Row(label, steps, seconds, ratio, limit, batch_size / seconds.median, peak)


def step_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ('method', 'step, ms', 'quartiles', 'ratio', 'quartiles', 'limit', 'distance', 'images/s', 'peak, MB')
    lines = [
        (
            row.label,
            f'{1e3 * row.seconds.median:.2f}',
            f'{1e3 * row.seconds.low:.2f} to {1e3 * row.seconds.high:.2f}',
            f'{row.ratio.median:.3f}',
            f'{row.ratio.low:.3f} to {row.ratio.high:.3f}',
            '' if row.limit is None else f'{row.limit:.3f}',
            '' if row.distance is None else f'{row.distance:+.1f} %',
            f'{row.images_per_second:.1f}',
            'n/a' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:.1f}',
        )
        for row in rows
    ]
    return columns([head, *lines])


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells under each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
