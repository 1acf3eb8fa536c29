"""Figures over the batches, the rule that proposes ``rho``, and both as text, JSON and a picture.

Of each radius: the mean rise of the loss over the batches, R; its standard error, the noise; and the linearity
``R / (rho * slope)``, which is 1 where the loss is linear along the perturbation. The rule (ours): the proposal is the
largest radius up to which, from the first one that is out of the noise, the gradient explains the rise, and the rise is
little: the linearity is within a tolerance of 1, and R within the same tolerance of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from mm_sharp.analysis.find_rho.measure import BatchRises
from mm_sharp.analysis.tables import columns
from mm_sharp.hooks.scale_report import OF_THE_LOSS

# A rise is out of the noise if it is so many standard errors.
ERRORS = 2.0


@dataclass(frozen=True)
class Point:
    """What was found at one radius, over all batches."""

    rho: float
    rise: float  # mean of L(w + e) - L(w)
    noise: float  # its standard error over the batches; infinite with one batch
    expected: float  # rho times the mean slope: the rise, were the loss linear
    loss: float  # mean of L(w)
    relative: float  # ||e|| / ||w||, mean

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
    """The proposed radius, or None; and why it is that one, or what to do. The points ascend in rho."""
    clear = list(dropwhile(lambda point: point.is_noise, points))
    if not clear:
        return None, 'no rise is out of the noise: give more --batches, or larger values of --rho'

    def is_near(point: Point) -> bool:
        """Out of the noise, as the gradient says, and with a small rise."""
        return not point.is_noise and abs(point.linearity - 1) <= tolerance and point.share <= tolerance

    near = list(takewhile(is_near, clear))
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


@dataclass(frozen=True)
class Findings:
    """All that was found of one config."""

    points: Sequence[Point]  # in ascending order of rho
    shares: Mapping[str, float]  # of the perturbation, by part of the model; the largest first
    steps: int  # of training before
    batches: int  # that were measured
    tolerance: float  # of linearity and rise
    arguments: Mapping[str, Any]  # of the wrapper whose perturbation was measured
    own: float | None  # the config's rho
    remark: str  # what is to be said besides, or ''


def text(found: Findings) -> str:
    """The table and the proposal."""
    lines = [['rho', '|e|/|w|', 'rise', 'of the loss', 'noise', 'linearity', '']]
    proposal, reason = propose(found.points, found.tolerance)
    for point in found.points:
        marks = {'noise': point.is_noise, 'the config': point.rho == found.own, '<-': point.rho == proposal}
        figures = [percent(point.relative), f'{point.rise:.3g}', percent(point.share)]
        figures += [f'{point.noise:.2g}', f'{point.linearity:.2f}']
        lines.append([f'{point.rho:g}', *figures, ' '.join(mark for mark, holds in marks.items() if holds)])
    shares = ', '.join(f'{name} {percent(share)}' for name, share in found.shares.items())
    measured = f'after {found.steps} steps; means of {found.batches} batches, with their standard errors as noise'
    notes = [f'loss {found.points[0].loss:.4g} {measured}', f'the perturbation lies in: {shares}']
    notes += [found.remark] if found.remark else []
    arguments = ''.join(f', {name}={value!r}' for name, value in found.arguments.items())
    notes.append(f'Proposed: rho={proposal:g}{arguments} ({reason})' if proposal else f'No proposal: {reason}')
    early = 'it raises the loss by {} only: measure a model that is trained, by more --steps or --load-from'
    small = [point.share for point in found.points if point.rho == proposal and point.share < OF_THE_LOSS]
    notes += [early.format(percent(share)) for share in small]
    return '\n'.join([columns(lines), '', *notes])


def content(found: Findings) -> dict[str, Any]:
    """Everything."""
    proposal, reason = propose(found.points, found.tolerance)
    points = [{**asdict(point), 'linearity': point.linearity, 'share': point.share} for point in found.points]
    return {'proposed': proposal, 'reason': reason, **asdict(found), 'points': points}


def draw(file: Path, found: Findings, title: str) -> None:
    """Write a PNG: the rise against rho, the band of its noise, the linear prediction, and the proposal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), layout='constrained')
    axes = figure.subplots()
    rhos = [point.rho for point in found.points]
    rises, noise, expected = np.array([(p.rise, ERRORS * p.noise, p.expected) for p in found.points]).T
    floor = 0.3 * expected.min()  # a logarithmic axis has no zero
    band = np.maximum(rises - noise, floor), rises + noise
    axes.fill_between(rhos, *band, alpha=0.3, label='noise (2 standard errors)')
    axes.plot(rhos, np.maximum(rises, floor), marker='o', ms=4, label='rise of the loss')
    axes.plot(rhos, expected, ls='--', color='black', lw=1, label='if it were linear')
    proposal, _ = propose(found.points, found.tolerance)
    if proposal is not None:
        axes.axvline(proposal, color='tab:green', lw=2, label=f'proposed: {proposal:g}')
    if found.own is not None:
        axes.axvline(found.own, color='tab:red', ls=':', label=f'the config: {found.own:g}')
    axes.set(xscale='log', yscale='log', xlabel='rho', ylabel='L(w + e) - L(w)')
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)
