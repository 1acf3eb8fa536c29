"""Comparisons as tables and pictures (ours)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_sharp.analysis.study.results import Comparison
from mm_sharp.analysis.study.spec import BASE, Study
from mm_sharp.analysis.study.statistics import Interval
from mm_sharp.analysis.study.unfinished import Trial

_HEAD = ('method', 'rho', 'epochs', 'compute', 'mean', 'over base')
_TITLES = {'epochs': 'equal epochs', 'compute': 'equal compute'}


def markdown(study: Study, found: Sequence[Comparison]) -> str:
    """A table for each setting and budget, in Markdown. Bold: the interval of the difference leaves out 0.

    Where runs are missing, a column says how many seeds a method has.
    """
    parts = []
    for setting, budget in dict.fromkeys((entry.setting, entry.budget) for entry in found):
        rows = [entry for entry in found if (entry.setting, entry.budget) == (setting, budget)]
        whole = {entry.method: entry.mean.count for entry in rows} == dict.fromkeys(study.methods, len(study.seeds))
        head = [*_HEAD, *([f'over {study.control}'] if study.control else []), *([] if whole else ['seeds'])]
        lines = []
        for entry in rows:
            cells = [entry.method, '' if entry.rho is None else f'{entry.rho:g}', str(entry.epochs)]
            cells += [f'{entry.compute:.2f}', _mean(entry.mean)]
            cells.append(_difference(entry.over_base))
            cells += [_difference(entry.over_control)] if study.control else []
            lines.append(cells if whole else [*cells, f'{entry.mean.count} of {len(study.seeds)}'])
        seeds = f'{len(study.seeds)} seeds' if whole else 'unfinished'
        parts.append(f'**{setting}, {_TITLES[budget]}** ({study.metric.name}, {seeds})\n\n{_table(head, lines)}')
    return '\n\n'.join(parts)


def markdown_trials(study: Study, trials: Sequence[Trial]) -> str:
    """A table for each unfinished choice of rho, in Markdown."""
    parts = []
    for settings in dict.fromkeys(trial.settings for trial in trials):
        lines = [
            [
                trial.method,
                '' if trial.rho is None else f'{trial.rho:g}',
                '' if trial.mean is None else f'{trial.mean:.2f}',
                f'{trial.made} of {trial.of}',
            ]
            for trial in trials
            if trial.settings == settings
        ]
        title = f'**{", ".join(settings)}, choosing rho** ({study.metric.name} on the validation data, unfinished)'
        parts.append(f'{title}\n\n{_table(["method", "rho", "mean", "runs"], lines)}')
    return '\n\n'.join(parts)


def as_json(study: Study, found: Sequence[Comparison], notes: Sequence[str] = ()) -> str:
    """All comparisons, with numbers as they are, and what is to be said of them."""
    content: dict[str, Any] = {'study': asdict(study), 'comparisons': [asdict(entry) for entry in found]}
    if notes:
        content['notes'] = list(notes)
    return json.dumps(content, indent=2) + '\n'


def plot(study: Study, found: Sequence[Comparison], file: Path) -> None:
    """Draw the paired differences from the base optimizer with their intervals, a panel for each setting and budget."""
    # Only here: the Agg canvas needs no display, and nothing else of the package needs matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(entry.setting for entry in found))
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    methods = [method for method in study.methods if method != BASE]
    figure = Figure(figsize=(4.2 * len(budgets) + 1.2, (0.26 * len(methods) + 0.75) * len(settings)), dpi=110)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(settings), len(budgets), squeeze=False, sharex='row', sharey=True)
    for row, setting in enumerate(settings):
        for column, budget in enumerate(budgets):
            axis = axes[row][column]
            axis.axvline(0, color='0.6', linewidth=1)
            for entry in found:
                if (entry.setting, entry.budget) == (setting, budget) and entry.over_base is not None:
                    _draw(axis, methods.index(entry.method), entry.over_base, study.metric.better)
            axis.set_yticks(range(len(methods)), methods, fontsize=8)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.tick_params(axis='x', labelsize=7)
            axis.set_title(f'{setting}, {_TITLES[budget]}', fontsize=8)
    figure.supxlabel(f'{study.metric.name}: difference from the base optimizer, 95 % interval', fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(line)} |' for line in (head, ['---'] * len(head), *lines))


def _draw(axis: Any, place: int, difference: Interval, better: str) -> None:
    good = difference.sign * (1 if better == 'higher' else -1)
    colour = {1: 'tab:green', 0: '0.35', -1: 'tab:red'}[good]
    half = difference.half if difference.count > 1 else 0.0
    axis.errorbar(difference.mean, place, xerr=half, fmt='o', markersize=4, capsize=3, color=colour)


def _mean(mean: Interval) -> str:
    return f'{mean.mean:.2f}' if mean.count == 1 else f'{mean.mean:.2f} ± {mean.half:.2f}'


def _difference(difference: Interval | None) -> str:
    if difference is None:
        return ''
    text = f'{difference.mean:+.2f}' if difference.count == 1 else f'{difference.mean:+.2f} ± {difference.half:.2f}'
    return f'**{text}**' if difference.sign else text
