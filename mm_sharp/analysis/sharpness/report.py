"""The figures of several checkpoints as text, CSV, JSON and one picture, with what they were measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm_sharp.analysis.sharpness.loading import Samples
from mm_sharp.analysis.sharpness.measure import Findings, Settings
from mm_sharp.analysis.tables import columns

_LOGARITHMIC = 30.0  # losses that differ by more than this factor are drawn on a logarithmic scale


class Entry(NamedTuple):
    """One checkpoint, its config file, the epochs that it was trained for, and what was found on which samples."""

    name: str
    config: str
    checkpoint: str
    epoch: int
    samples: Samples
    findings: Findings


def figures_of(found: Findings) -> Iterator[tuple[str, str, Any]]:
    """Column, label (with a star where it is a surrogate's) and value of each figure; None for what is not known."""
    star = '*' if found.surrogate else ''
    yield 'loss', 'loss', found.loss
    yield 'gradient_norm', f'gradient norm{star}', found.gradient_norm
    if found.eigenvalues is not None:
        pairs = [*zip(found.eigenvalues.values, found.eigenvalues.residuals, strict=True)]
        for number, (value, residual) in enumerate(pairs or [(None, None)], 1):
            yield f'eigenvalue_{number}', f'Hessian eigenvalue {number}{star}', value
            yield f'residual_{number}', '  residual', residual
    value, error = found.trace[:2] if found.trace else (None, None)
    yield 'trace', f'Hessian trace{star}', value
    yield 'trace_standard_error', '  standard error', error
    for ball in found.balls:
        yield f'sharpness_{ball.rho:g}', f'rise at rho = {ball.rho:g}, one step', ball.one_step
    for ball in found.balls:
        if ball.ascent is not None:
            yield f'ascent_{ball.rho:g}', f'rise within rho = {ball.rho:g}, ascent', ball.ascent
    for rho, difference in found.differences.items():
        yield f'difference_{rho:g}', f'curvature along v1 at {rho:g}', difference


def row(entry: Entry) -> dict[str, Any]:
    """One checkpoint's figures by column; None for what is not known."""
    found, samples = entry.findings, entry.samples
    derivatives = 'straight-through surrogate' if found.surrogate else 'exact'
    head = {'name': entry.name, 'epoch': entry.epoch, **{column: value for column, _, value in figures_of(found)}}
    loss = {'parameters': found.parameters, 'loss_modules': found.loss_name, 'training_loss': found.averaging}
    data = {'dataset': samples.dataset, 'split': samples.split, 'samples': len(samples), 'seed': samples.seed}
    origin = {'digest': samples.digest, 'config': entry.config, 'checkpoint': entry.checkpoint}
    return {**head, 'derivatives': derivatives, **loss, **data, **origin}


def table(entries: Sequence[Entry]) -> str:
    """The figures as text, a column for each checkpoint, and below them what they are of."""
    figures = [{column: (label, value) for column, label, value in figures_of(e.findings)} for e in entries]
    lines = [['', *(entry.name for entry in entries)]]
    for column, label in {column: pair[0] for found in figures for column, pair in found.items()}.items():
        cells = [found.get(column, (label, None)) for found in figures]
        if any(value is not None for _, value in cells):
            texts = ['-' if value is None else f'{value:.4g}{"*" if "*" in own else ""}' for own, value in cells]
            lines.append([label.rstrip('*'), *texts])
    facts = [
        f'mean of {found.loss_name} over {len(samples)} of {samples.available} samples, {samples.dataset} '
        f'({samples.split}, seed {samples.seed}, digest {samples.digest}), evaluation mode; {found.parameters:,} of '
        f'{found.all_parameters:,} parameters'
        for samples, found in ((entry.samples, entry.findings) for entry in entries)
    ]
    notes = facts[:1] if len({*facts}) == 1 else [f'{e.name}: {f}' for e, f in zip(entries, facts, strict=True)]
    if len({entry.samples.digest for entry in entries}) > 1:
        notes.append('These are NOT the same samples for all: the columns cannot be compared.')
    for remark in dict.fromkeys(remark for entry in entries for remark in entry.findings.remarks):
        names = [entry.name for entry in entries if remark in entry.findings.remarks]
        notes.append(remark if len(names) == len(entries) else f'{", ".join(names)}: {remark}')
    return '\n'.join([columns(lines), '', *notes])


def content(entries: Sequence[Entry], settings: Settings, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, landscapes too."""
    places = settings.places if settings.landscape else []
    measured = [_complete(entry) for entry in entries]
    return {'settings': asdict(settings), 'machine': machine, 'landscape_places': places, 'checkpoints': measured}


def _complete(entry: Entry) -> dict[str, Any]:
    found, samples = entry.findings, entry.samples
    content = {**entry._asdict(), **vars(found)}
    if found.eigenvalues is not None:  # but for the vectors, which are as large as the model
        content['eigenvalues'] = {key: value for key, value in found.eigenvalues._asdict().items() if key != 'vectors'}
    content['trace'] = found.trace and found.trace._asdict()
    content['balls'] = [ball._asdict() for ball in found.balls]
    content['differences'] = [{'rho': rho, 'curvature': value} for rho, value in found.differences.items()]
    data = {key: value for key, value in vars(samples).items() if key not in ('rows', 'collate')}
    del content['findings']
    return {**content, 'samples': {**data, 'count': len(samples)}}


def draw(file: Path, entries: Sequence[Entry], settings: Settings) -> None:
    """Write a PNG: curves of all checkpoints together, below them a plane for each, all with one scale of colours."""
    from matplotlib.figure import Figure

    lines, planes = ([e for e in entries if getattr(e.findings, kind)] for kind in ('line', 'plane'))
    # 100 dots an inch, about as wide as a page shows it, so that its text is not made smaller.
    figure = Figure(figsize=(max(8.4, 2.6 * len(planes)), 6.6 if planes else 3.7), layout='constrained')
    upper, *lower = figure.subfigures(1 + bool(planes), 1, squeeze=False)[:, 0]
    curves, balls = upper.subplots(1, 2)
    for entry in lines:
        curves.plot(settings.places, entry.findings.line, marker='.', label=entry.name)
    if lines:
        scale = 'log' if _wide_range([entry.findings.line for entry in lines]) else 'linear'
        curves.set(xlabel='distance t along a random direction', ylabel='loss', yscale=scale)
        curves.legend()
    curves.set_visible(bool(lines))
    _draw_balls(balls, entries)
    if planes:
        _draw_planes(lower[0], planes, settings)
    samples = entries[0].samples
    title = f'{samples.dataset} ({samples.split}): {len(samples)} samples, seed {samples.seed}\n'
    upper.suptitle(f'{title}{entries[0].findings.loss_name}, evaluation mode', fontsize=10)
    figure.savefig(file, dpi=100)


def _draw_balls(axes: Any, entries: Sequence[Entry]) -> None:
    for entry in entries:
        rhos, one_step, ascent, _ = zip(*sorted(entry.findings.balls), strict=True)
        (curve,) = axes.plot(rhos, one_step, marker='o', label=entry.name)
        if ascent[0] is not None:
            axes.plot(rhos, ascent, ls=':', marker='^', color=curve.get_color())
    if len(axes.lines) > len(entries):
        axes.plot([], [], color='gray', marker='o', label='one step')
        axes.plot([], [], color='gray', ls=':', marker='^', label='ascent')
    axes.set(xlabel='rho', ylabel='rise of the loss')
    axes.legend()


def _draw_planes(figure: Any, entries: Sequence[Entry], settings: Settings) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = np.array([entry.findings.plane for entry in entries])
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = float(finite.min()), float(finite.max())
    high = max(high, low + max(abs(low), 1.0) * 1e-6)  # a constant has no levels
    spaced, scale = (np.geomspace, LogNorm) if _wide_range(values) else (np.linspace, Normalize)
    levels, norm = spaced(low, high, 15), scale(low, high)
    panels = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
    ends = [settings.places[0], 0, settings.places[-1]]
    for panel, entry, grid in zip(panels, entries, values, strict=True):
        shades = panel.contourf(settings.places, settings.places, grid, levels=levels, norm=norm)
        panel.plot(0, 0, marker='+', color='red')
        panel.set(xlabel='s', title=entry.name, aspect='equal', xticks=ends, yticks=ends)
    panels[0].set_ylabel('t')
    figure.colorbar(shades, ax=panels, label='loss', format='%.2g', ticks=levels[::2])


def _wide_range(values: Any) -> bool:
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return bool(numbers.size and numbers.min() > 0 and numbers.max() > _LOGARITHMIC * numbers.min())
