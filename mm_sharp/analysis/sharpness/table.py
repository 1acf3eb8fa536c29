"""The figures of several checkpoints as text, CSV and JSON, with what they were measured on (ours)."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_sharp.analysis.benchmark.compare import columns
from mm_sharp.analysis.sharpness.measure import Findings, Settings
from mm_sharp.analysis.sharpness.samples import Samples

# Columns that are a surrogate's where the model is quantized.
_DERIVATIVES = re.compile(r'gradient_norm|eigenvalue_\d+|trace')


@dataclass(frozen=True)
class Entry:
    """One checkpoint and what was found about it.

    Args:
        name: As tables and figures call it.
        config: Its config file.
        checkpoint: The file.
        epoch: Epochs that it was trained for.
        samples: What it was measured on.
        findings: What was found.
    """

    name: str
    config: str
    checkpoint: str
    epoch: int
    samples: Samples
    findings: Findings


def row(entry: Entry) -> dict[str, Any]:
    """One checkpoint's figures by column; None for what was not measured."""
    found, samples = entry.findings, entry.samples
    return {
        'name': entry.name,
        'epoch': entry.epoch,
        'loss': found.loss,
        'gradient_norm': found.gradient_norm,
        **_eigenvalue_cells(found),
        'trace': None if found.trace is None else found.trace.value,
        'trace_standard_error': None if found.trace is None else found.trace.standard_error,
        **{f'sharpness_{ball.rho:g}': ball.one_step for ball in found.balls},
        **{f'ascent_{ball.rho:g}': ball.ascent for ball in found.balls if ball.ascent is not None},
        **{f'difference_{rho:g}': value for rho, value in found.differences.items()},
        'derivatives': 'straight-through surrogate' if found.surrogate else 'exact',
        'parameters': found.parameters,
        'loss_modules': found.loss_name,
        'training_loss': found.averaging,
        'dataset': samples.dataset,
        'split': samples.split,
        'samples': len(samples),
        'seed': samples.seed,
        'digest': samples.digest,
        'config': entry.config,
        'checkpoint': entry.checkpoint,
    }


def _eigenvalue_cells(found: Findings) -> dict[str, Any]:
    if found.eigenvalues is None:
        return {}
    pairs = zip(found.eigenvalues.values, found.eigenvalues.residuals, strict=True)
    cells: dict[str, Any] = {}
    for number, (value, residual) in enumerate(pairs, 1):
        cells.update({f'eigenvalue_{number}': value, f'residual_{number}': residual})
    return cells or {'eigenvalue_1': None, 'residual_1': None}


def table(entries: Sequence[Entry]) -> str:
    """The figures as text, a column for each checkpoint, and below them what they are of."""
    labels = _labels([entry.findings for entry in entries])
    rows = [row(entry) for entry in entries]
    lines = [['', *(entry.name for entry in entries)]]
    lines += [[label, *(_cell(cells, key) for cells in rows)] for key, label in labels.items()]
    facts = [_measured_on(entry) for entry in entries]
    notes = facts[:1] if len({*facts}) == 1 else [f'{e.name}: {f}' for e, f in zip(entries, facts, strict=True)]
    if len({entry.samples.digest for entry in entries}) > 1:
        notes.append('These are NOT the same samples for all: the columns cannot be compared.')
    of: dict[str, list[str]] = {}
    for entry in entries:
        for remark in entry.findings.remarks:
            of.setdefault(remark, []).append(entry.name)
    notes += [remark if len(names) == len(entries) else f'{", ".join(names)}: {remark}' for remark, names in of.items()]
    return '\n'.join([columns(lines), '', *dict.fromkeys(notes)])


def _labels(findings: Sequence[Findings]) -> dict[str, str]:
    """Row labels by column name, in the order of the table."""
    labels = {'loss': 'loss', 'gradient_norm': 'gradient norm'}
    count = max((len(f.eigenvalues.values) or 1 if f.eigenvalues else 0 for f in findings), default=0)
    for number in range(1, count + 1):
        labels[f'eigenvalue_{number}'] = f'Hessian eigenvalue {number}'
        labels[f'residual_{number}'] = '  residual'
    if any(found.trace for found in findings):
        labels['trace'] = 'Hessian trace'
        labels['trace_standard_error'] = '  standard error'
    rhos = dict.fromkeys(ball.rho for found in findings for ball in found.balls)
    for rho in rhos:
        labels[f'sharpness_{rho:g}'] = f'rise at rho = {rho:g}, one step'
    for rho in rhos:
        if any(ball.ascent is not None for found in findings for ball in found.balls):
            labels[f'ascent_{rho:g}'] = f'rise within rho = {rho:g}, ascent'
    for rho in dict.fromkeys(rho for found in findings for rho in found.differences):
        labels[f'difference_{rho:g}'] = f'curvature along v1 at {rho:g}'
    return labels


def _cell(cells: Mapping[str, Any], key: str) -> str:
    value = cells.get(key)
    if value is None:
        return '-'
    starred = cells['derivatives'] != 'exact' and _DERIVATIVES.fullmatch(key)
    return f'{value:.4g}{"*" if starred else ""}'


def _measured_on(entry: Entry) -> str:
    samples, found = entry.samples, entry.findings
    return (
        f'mean of {found.loss_name} over {len(samples)} of {samples.available} samples, {samples.dataset} '
        f'({samples.split}, seed {samples.seed}, digest {samples.digest}), evaluation mode; {found.parameters:,} of '
        f'{found.all_parameters:,} parameters'
    )


def write_csv(file: Path, entries: Sequence[Entry]) -> None:
    """A line for each checkpoint; an empty cell for what was not measured."""
    rows = [row(entry) for entry in entries]
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    with file.open('w', newline='', encoding='utf-8') as stream:
        writer = csv.DictWriter(stream, names, restval='')
        writer.writeheader()
        writer.writerows(rows)


def write_json(file: Path, entries: Sequence[Entry], settings: Settings, machine: Mapping[str, Any]) -> None:
    """Everything, landscapes too; null in place of numbers that are not finite."""
    content = {
        'settings': asdict(settings),
        'machine': dict(machine),
        'landscape_places': settings.places if settings.landscape else [],
        'checkpoints': [_complete(entry) for entry in entries],
    }
    file.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _complete(entry: Entry) -> dict[str, Any]:
    found, samples = entry.findings, entry.samples
    content = {key: value for key, value in vars(found).items() if key not in ('eigenvalues', 'trace', 'balls')}
    # But for the vectors, which are as large as the model.
    values = None if found.eigenvalues is None else vars(found.eigenvalues)
    content['eigenvalues'] = values and {key: value for key, value in values.items() if key != 'vectors'}
    content['trace'] = None if found.trace is None else asdict(found.trace)
    content['balls'] = [asdict(ball) for ball in found.balls]
    content['differences'] = [{'rho': rho, 'curvature': value} for rho, value in found.differences.items()]
    data = {key: value for key, value in vars(samples).items() if key not in ('rows', 'collate')}
    content['samples'] = {**data, 'count': len(samples)}
    return {'name': entry.name, 'config': entry.config, 'checkpoint': entry.checkpoint, 'epoch': entry.epoch, **content}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
