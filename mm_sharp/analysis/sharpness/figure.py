"""The figures of several checkpoints as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_sharp.analysis.sharpness.measure import Settings
from mm_sharp.analysis.sharpness.table import Entry

# Losses that differ by more than this factor are drawn on a logarithmic scale.
_LOGARITHMIC = 30.0


def draw(file: Path, entries: Sequence[Entry], settings: Settings) -> None:
    """Write a PNG: curves of all checkpoints together, below them a plane for each, all with one scale of colours."""
    from matplotlib.figure import Figure

    lines = [entry for entry in entries if entry.findings.line]
    planes = [entry for entry in entries if entry.findings.plane]
    rows, columns = 1 + bool(planes), max(2, len(planes))
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.4), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    if lines:
        _draw_lines(panels[0, 0], lines, settings)
    _draw_balls(panels[0, 1], entries)
    if planes:
        _draw_planes(figure, list(panels[1, : len(planes)]), planes, settings)
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
        axes.plot(settings.places, entry.findings.line, marker='.', label=entry.name)
    scale = 'log' if _wide_range([entry.findings.line for entry in entries]) else 'linear'
    axes.set(xlabel='distance t along a filter-normalised direction', ylabel='loss', yscale=scale, visible=True)
    axes.legend(fontsize=8)


def _draw_balls(axes: Any, entries: Sequence[Entry]) -> None:
    """Rises over rho: one step, and what an ascent found."""
    for entry in entries:
        balls = sorted(entry.findings.balls)
        rhos = [ball.rho for ball in balls]
        (curve,) = axes.plot(rhos, [ball.one_step for ball in balls], marker='o', label=entry.name)
        if balls[0].ascent is not None:
            axes.plot(rhos, [ball.ascent for ball in balls], ls=':', marker='^', color=curve.get_color())
    axes.set(xlabel='rho', ylabel='rise of the loss (dotted: by ascent)', visible=True)
    axes.legend(fontsize=8)


def _draw_planes(figure: Any, panels: Sequence[Any], entries: Sequence[Entry], settings: Settings) -> None:
    """L(w + s d_0 + t d_1) of each checkpoint, with one scale of colours."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.array([entry.findings.plane for entry in entries])
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = float(finite.min()), float(finite.max())
    high = max(high, low + max(abs(low), 1.0) * 1e-6)  # a constant has no levels
    logarithmic = _wide_range(values)
    levels = np.geomspace(low, high, 15) if logarithmic else np.linspace(low, high, 15)
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    for panel, entry, grid in zip(panels, entries, values, strict=True):
        shades = panel.contourf(settings.places, settings.places, grid, levels=levels, norm=norm)
        panel.plot(0, 0, marker='+', color='red')
        panel.set(xlabel='s', ylabel='t', aspect='equal', visible=True)
        panel.set_title(entry.name, fontsize=9)
    figure.colorbar(shades, ax=panels, label='loss', format='%.3g')


def _wide_range(values: Any) -> bool:
    """Whether positive losses are of very different sizes."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return bool(numbers.size and numbers.min() > 0 and numbers.max() > _LOGARITHMIC * numbers.min())
