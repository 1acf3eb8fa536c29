"""The figures of several checkpoints as one picture (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_sharp.analysis.sharpness.measure import Settings
from mm_sharp.analysis.sharpness.table import Entry

# Losses that differ by more than this factor are drawn on a logarithmic scale.
_LOGARITHMIC = 30.0
_LEVELS = 15
_PANEL = (4.2, 3.6)  # inches


def draw(file: Path, entries: Sequence[Entry], settings: Settings) -> None:
    """Write a PNG: curves of all checkpoints together, below them a plane for each, all with one scale of colours.

    Args:
        file: Is replaced.
        entries: At least one; their names must differ.
        settings: What they were measured with.
    """
    from matplotlib.figure import Figure

    lines = any(entry.findings.line for entry in entries)
    planes = [entry for entry in entries if entry.findings.plane]
    wide = max(2, len(planes))
    figure = Figure(figsize=(_PANEL[0] * wide, _PANEL[1] * (1 + bool(planes)) + 0.4), layout='constrained')
    grid = figure.add_gridspec(1 + bool(planes), 2 * wide)
    half = wide if lines else 0
    if lines:
        _draw_lines(figure.add_subplot(grid[0, :half]), entries, settings)
    _draw_balls(figure.add_subplot(grid[0, half:]), entries)
    axes = [figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(len(planes))]
    if planes:
        _draw_planes(figure, axes, planes, settings)
    samples = entries[0].samples
    figure.suptitle(
        f'{samples.dataset} ({samples.split}): {len(samples)} samples, seed {samples.seed}\n'
        f'{entries[0].findings.loss_name}, evaluation mode',
        fontsize=9,
    )
    figure.savefig(file, dpi=110)


def _draw_lines(axes: Any, entries: Sequence[Entry], settings: Settings) -> None:
    """L(w + t d) of all checkpoints."""
    for entry in entries:
        if entry.findings.line:
            axes.plot(settings.places, entry.findings.line, marker='.', label=entry.name)
    if _wide_range([entry.findings.line for entry in entries]):
        axes.set_yscale('log')
    axes.set(xlabel='distance t along a filter-normalised direction', ylabel='loss')
    axes.legend(fontsize=8)


def _draw_balls(axes: Any, entries: Sequence[Entry]) -> None:
    """Rises over rho: one step, and what an ascent found."""
    for entry in entries:
        balls = sorted(entry.findings.balls, key=lambda ball: ball.rho)
        (curve,) = axes.plot([b.rho for b in balls], [b.one_step for b in balls], marker='o', label=entry.name)
        if any(ball.ascent is not None for ball in balls):
            axes.plot([b.rho for b in balls], [b.ascent for b in balls], ls=':', marker='^', color=curve.get_color())
    axes.set(xlabel='rho', ylabel='rise of the loss (dotted: by ascent)')
    axes.legend(fontsize=8)


def _draw_planes(figure: Any, axes: Sequence[Any], entries: Sequence[Entry], settings: Settings) -> None:
    """L(w + s d_0 + t d_1) of each checkpoint, with one scale of colours."""
    from matplotlib.colors import LogNorm, Normalize

    values = [np.asarray(entry.findings.plane, np.float64) for entry in entries]
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in values])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    logarithmic = _wide_range([entry.findings.plane for entry in entries])
    if high <= low:  # a constant has no levels
        high = low + max(abs(low), 1.0) * 1e-6
    levels = np.geomspace(low, high, _LEVELS) if logarithmic else np.linspace(low, high, _LEVELS)
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    shades = None
    for panel, entry, grid in zip(axes, entries, values, strict=True):
        shades = panel.contourf(settings.places, settings.places, grid, levels=levels, norm=norm)
        panel.plot(0, 0, marker='+', color='red')
        panel.set_title(entry.name, fontsize=9)
        panel.set(xlabel='s', ylabel='t', aspect='equal')
    figure.colorbar(shades, ax=list(axes), label='loss', format='%.3g')


def _wide_range(values: Sequence[Any]) -> bool:
    """Whether positive losses are of very different sizes."""
    numbers = np.concatenate([np.ravel(np.asarray(value, np.float64)) for value in values])
    numbers = numbers[np.isfinite(numbers)]
    return bool(numbers.size and numbers.min() > 0 and numbers.max() > _LOGARITHMIC * numbers.min())
