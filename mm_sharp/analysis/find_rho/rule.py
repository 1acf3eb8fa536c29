"""Figures over the batches, and the rule that proposes ``rho``.

Of each radius: the mean rise of the loss over the batches, R; its standard error, the noise; and the linearity
``R / (rho * slope)``, which is 1 where the loss is linear along the perturbation. The rule (ours): the proposal is the
largest radius up to which, from the first one that is out of the noise, the gradient explains the rise, and the rise is
little: the linearity is within a tolerance of 1, and R within the same tolerance of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from statistics import mean, stdev

from mm_sharp.analysis.find_rho.probe import BatchRises

# A rise is out of the noise if it is so many standard errors.
ERRORS = 2.0


@dataclass(frozen=True)
class Point:
    """What was found at one radius, over all batches.

    Args:
        rho: The radius.
        rise: Mean of L(w + e) - L(w).
        noise: Its standard error over the batches; infinite with one batch.
        expected: rho times the mean slope: the rise, were the loss linear.
        loss: Mean of L(w).
        relative: ||e|| / ||w||, mean.
    """

    rho: float
    rise: float
    noise: float
    expected: float
    loss: float
    relative: float

    @property
    def linearity(self) -> float:
        """The rise over what is expected."""
        return self.rise / self.expected

    @property
    def share(self) -> float:
        """The rise as a share of the loss."""
        return self.rise / abs(self.loss) if self.loss else math.inf

    @property
    def is_noise(self) -> bool:
        """Whether the rise may be nothing."""
        return not self.rise > ERRORS * self.noise

    def is_near(self, tolerance: float) -> bool:
        """Whether w + e is in the neighbourhood of w: out of the noise, as the gradient says, and with a small rise."""
        return not self.is_noise and abs(self.linearity - 1) <= tolerance and self.share <= tolerance


def points_of(rhos: Sequence[float], batches: Sequence[BatchRises]) -> list[Point]:
    """The figures of each radius, in ascending order."""
    loss, slope = mean(b.loss for b in batches), mean(b.slope for b in batches)
    relative = mean(b.scale.relative for b in batches) / rhos[0]
    points = []
    for number, rho in enumerate(rhos):
        rises = [batch.rises[number] for batch in batches]
        finite = all(map(math.isfinite, rises))
        noise = stdev(rises) / math.sqrt(len(rises)) if finite and len(rises) > 1 else math.inf
        points.append(Point(rho, mean(rises) if finite else math.nan, noise, rho * slope, loss, rho * relative))
    return sorted(points, key=lambda point: point.rho)


def shares_of(batches: Sequence[BatchRises]) -> dict[str, float]:
    """The share of the perturbation's squared norm in each top-level part of the model, mean; the largest first."""
    names = dict.fromkeys(part.name for batch in batches for part in batch.scale.parts)
    found = [{part.name: batch.scale.share(part) for part in batch.scale.parts} for batch in batches]
    shares = {name: mean(each.get(name, 0.0) for each in found) for name in names}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def propose(points: Sequence[Point], tolerance: float) -> tuple[float | None, str]:
    """The proposed radius, or None; and why it is that one, or what to do.

    Args:
        points: In ascending order of rho.
        tolerance: How far the linearity may be from 1, and how much of the loss the rise may be.
    """
    clear = list(dropwhile(lambda point: point.is_noise, points))
    if not clear:
        return None, 'no rise is out of the noise: give more --batches, or larger values of --rho'
    near = list(takewhile(lambda point: point.is_near(tolerance), clear))
    if not near:
        return None, f'already {_said(clear[0])}: give smaller values of --rho'
    if len(near) == len(clear):
        return near[-1].rho, 'the largest of the grid, so the limit lies above it: give larger values of --rho'
    return near[-1].rho, _said(clear[len(near)])


def percent(share: float) -> str:
    """A share in percent."""
    return f'{100 * share:.0f} %' if abs(share) > 0.095 else f'{100 * share:.2g} %'


def _said(point: Point) -> str:
    return f'{point.rho:g} has a linearity of {point.linearity:.2f} and raises the loss by {percent(point.share)}'
