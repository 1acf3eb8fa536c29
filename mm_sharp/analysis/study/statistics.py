"""Means over seeds, with 95 % intervals, and paired differences (ours).

The intervals are Student's, for a mean of independent normal values: with five seeds they are 2.8 standard errors wide
on each side. Two methods are compared by their difference at each seed, since they share initial weights and order of
the samples; an interval of that difference which leaves out 0 is significant at 5 %, for one comparison: of twenty, one
will be by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and half the length of its 95 % interval.

    Args:
        mean: Of the values.
        half: Infinite for a single value.
        count: Number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value and its interval.

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f'values={list(values)!r} is not allowed: they must be finite numbers, at least one')
    if len(array) == 1:
        return Interval(float(array[0]), math.inf, 1)
    error = array.std(ddof=1) / math.sqrt(len(array))
    return Interval(float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * error), len(array))


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference of values and others, which belong together one by one.

    Raises:
        ValueError: They are not as many, or none, or one is not finite.
    """
    if len(values) != len(others):
        raise ValueError(f'{len(values)} values and {len(others)} others do not make pairs')
    return interval([a - b for a, b in zip(values, others, strict=True)])
