"""The sensitivities of layers as a table, a picture and a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_sharp.analysis import tables
from mm_sharp.analysis.post_training.proposal import Proposal
from mm_sharp.analysis.post_training.sensitivity import FLOAT, Choice, Sensitivity

_DRAWN = 60  # layers in the picture, the most sensitive ones


def table(found: Sensitivity, weights: Mapping[str, int], choice: Choice | None = None) -> str:
    """A line for each layer, the most sensitive first: its weights, what each policy adds, and what is proposed."""
    tried = _tried(found)
    lines = [['layer', 'weights', *tried, *(['proposed'] if choice else [])]]
    for name in found.ranked():
        costs = [f'{found.costs[name][policy]:+.3g}' for policy in tried]
        lines.append([name, f'{weights[name]:,}', *costs, *([choice[name]] if choice else [])])
    return tables.columns(lines)


def candidates(proposal: Proposal, measured: str) -> str:
    """A line for the proposal, and for each policy in all layers."""
    timed = proposal.candidates[0].milliseconds > 0
    lines = [['', 'MB', 'bits a weight', *(['ms', 'times float'] if timed else []), measured]]
    for one in proposal.candidates:
        times = [f'{one.milliseconds:.2f}', f'{one.times_float:.2f}'] if timed else []
        lines.append([one.name, f'{one.bytes / 1e6:.3f}', f'{one.mean_bits:.2f}', *times, f'{one.value:.5g}'])
    return tables.columns(lines)


def draw(file: Path, found: Sensitivity, measured: str) -> None:
    """Write a PNG: bars from the left for each layer, the most sensitive one at the top."""
    from matplotlib.figure import Figure

    tried, names = _tried(found), found.ranked()[:_DRAWN]
    height = 0.8 / len(tried)
    figure = Figure(figsize=(8, 1.6 + 0.22 * len(names) * max(1, len(tried) / 2)), layout='constrained')
    axes = figure.subplots()
    for number, policy in enumerate(tried):
        places = [row + (number - (len(tried) - 1) / 2) * height for row in range(len(names))]
        axes.barh(places, [found.costs[name][policy] for name in names], height, label=policy.upper())
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color='black', linewidth=0.8)
    axes.grid(axis='x', alpha=0.3)
    axes.set_xlabel(f'change of {measured}')
    how = 'alone quantized, all others float' if found.others == FLOAT else f'alone spared, all others {found.others}'
    left_out = f' ({_DRAWN} of {len(found.costs)} layers)' if len(found.costs) > _DRAWN else ''
    axes.set_title(f'Each layer {how}{left_out}', fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def write_json(file: Path, found: Sensitivity, weights: Mapping[str, int], settings: Mapping[str, Any]) -> None:
    """Everything, the most sensitive layer first."""
    layers = [{'layer': name, 'weights': weights[name], 'costs': found.costs[name]} for name in found.ranked()]
    content = {'settings': dict(settings), 'others': found.others, 'value': found.value, 'layers': layers}
    tables.write_json(file, content)


def _tried(found: Sensitivity) -> Sequence[str]:
    return [policy for policy in next(iter(found.costs.values()), {}) if policy != found.others]
