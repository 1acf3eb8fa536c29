"""What was found, as text, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_sharp.analysis.find_rho.rule import ERRORS, Point, percent, propose
from mm_sharp.analysis.tables import columns


@dataclass(frozen=True)
class Findings:
    """All that was found of one config.

    Args:
        points: In ascending order of rho.
        shares: Of the perturbation, by part of the model; the largest first.
        steps: Of training before.
        batches: That were measured.
        tolerance: Of linearity and rise.
        arguments: Of the wrapper whose perturbation was measured.
        own: The config's rho, or None.
        remark: What is to be said besides, or ''.
    """

    points: Sequence[Point]
    shares: Mapping[str, float]
    steps: int
    batches: int
    tolerance: float
    arguments: Mapping[str, Any]
    own: float | None
    remark: str

    @property
    def measure(self) -> str:
        """The arguments as a config has them."""
        return ''.join(f', {name}={value!r}' for name, value in self.arguments.items())


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
    said = f'Proposed: rho={proposal:g}{found.measure} ({reason})' if proposal else f'No proposal: {reason}'
    notes = [
        f'loss {found.points[0].loss:.4g} after {found.steps} steps; means of {found.batches} batches, with their '
        'standard errors as noise',
        f'the perturbation lies in: {shares}',
        *([found.remark] if found.remark else []),
        said,
    ]
    return '\n'.join([columns(lines), '', *notes])


def write_json(file: Path, found: Findings) -> None:
    """Everything; null in place of numbers that are not finite."""
    proposal, reason = propose(found.points, found.tolerance)
    points = [{**asdict(point), 'linearity': point.linearity, 'share': point.share} for point in found.points]
    content = {'proposed': proposal, 'reason': reason, **asdict(found), 'points': points}
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    file.write_text(json.dumps(plain, indent=2) + '\n', encoding='utf-8')


def draw(file: Path, found: Findings, title: str) -> None:
    """Write a PNG: the rise against rho, the band of its noise, the linear prediction, and the proposal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), layout='constrained')
    axes = figure.subplots()
    rhos = [point.rho for point in found.points]
    low, high = ([p.rise + sign * ERRORS * p.noise for p in found.points] for sign in (-1, 1))
    floor = 0.3 * min([p.expected for p in found.points])  # a logarithmic axis has no zero
    axes.fill_between(rhos, [max(value, floor) for value in low], high, alpha=0.3, label='noise (2 standard errors)')
    axes.plot(rhos, [max(p.rise, floor) for p in found.points], marker='o', ms=4, label='rise of the loss')
    axes.plot(rhos, [p.expected for p in found.points], ls='--', color='black', lw=1, label='if it were linear')
    proposal, _ = propose(found.points, found.tolerance)
    if proposal is not None:
        axes.axvline(proposal, color='tab:green', lw=2, label=f'proposed: {proposal:g}')
    if found.own is not None:
        axes.axvline(found.own, color='tab:red', ls=':', label=f'the config: {found.own:g}')
    axes.set(xscale='log', yscale='log', xlabel='rho', ylabel='L(w + e) - L(w)')
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)
