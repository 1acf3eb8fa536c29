"""The results of a study as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from mm_sharp.analysis.study.plan import Plan
from mm_sharp.analysis.study.results import Comparison, Interval, Rows, trials
from mm_sharp.analysis.study.spec import BASE, Study
from mm_sharp.analysis.tables import markdown_columns, markdown_table

_LOOKS = {1: ('tab:green', 'better'), 0: ('0.35', 'the interval contains 0'), -1: ('tab:red', 'worse')}
_TITLES = {'epochs': 'equal epochs', 'compute': 'equal compute', 'time': 'equal measured time'}


def markdown(study: Study, found: Sequence[Comparison]) -> str:
    """A table for each setting and budget, in Markdown. Bold: the interval of the difference leaves out 0."""
    parts = []
    for setting, budget in dict.fromkeys((entry.setting, entry.budget) for entry in found):
        rows = [entry for entry in found if (entry.setting, entry.budget) == (setting, budget)]
        made = {entry.method: entry.mean.count for entry in rows}
        whole = made == dict.fromkeys(study.methods_in(setting), len(study.seeds))
        table = {
            'method': [entry.method for entry in rows],
            'rho': [_rho(entry.rho) for entry in rows],
            'epochs': [str(entry.epochs) for entry in rows],
            'compute': [f'{entry.compute:.2f}' for entry in rows],
            'time': ['' if entry.time is None else f'{entry.time:.2f}' for entry in rows],
            'mean': [_text(entry.mean) for entry in rows],
            'over base': [_difference(entry.over_base) for entry in rows],
            f'over {study.control}': [_difference(entry.over_control) for entry in rows],
            'seeds': [f'{entry.mean.count} of {len(study.seeds)}' for entry in rows],
        }
        # Without a control; where all seeds are there; where no times are.
        left_out = {'over ': True, 'seeds': whole, 'time': not any(table['time'])}
        shown = {name: cells for name, cells in table.items() if not left_out.get(name)}
        seeds = f'{len(study.seeds)} seeds' if whole else 'unfinished'
        parts.append(f'**{setting}, {_TITLES[budget]}** ({study.metric.name}, {seeds})\n\n{markdown_columns(shown)}')
    return '\n\n'.join(parts)


def markdown_trials(plan: Plan, rows: Rows, settings: Sequence[str]) -> str:
    """A table of what each rho has given so far, in a pool of settings whose rho is not chosen yet."""
    metric, lines = plan.study.metric, [['method', 'rho', 'mean', 'runs']]
    for (method, rho), same in trials(plan, settings).items():
        values = [rows.value(run, metric.name) for run in same if run.id in rows.by_id]
        mean = f'{metric.scale * sum(values) / len(values):.2f}' if values else ''
        lines.append([method, _rho(rho), mean, f'{len(values)} of {len(same)}'])
    title = f'**{", ".join(settings)}, choosing rho** ({metric.name} on the validation data, unfinished)'
    return f'{title}\n\n{markdown_table(lines)}'


def content(study: Study, found: Sequence[Comparison], notes: Sequence[str] = ()) -> dict[str, Any]:
    """All comparisons, with numbers as they are, and what is to be said of them."""
    comparisons = [asdict(entry) for entry in found]
    return {'study': asdict(study), 'comparisons': comparisons, **({'notes': notes} if notes else {})}


def plot(study: Study, found: Sequence[Comparison], file: Path) -> None:
    """Draw the paired differences from the base optimizer with their intervals, a panel for each setting and budget."""
    from matplotlib.figure import Figure  # only here: nothing else of the study needs it
    from matplotlib.lines import Line2D

    settings = list(dict.fromkeys(entry.setting for entry in found))
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    methods = [method for method in study.methods if method != BASE]
    names = [study.labels.get(method, method) for method in methods]
    margin = 0.3 + 0.07 * max(map(len, names), default=0)
    width, line = (4.2, ', ') if len(budgets) == 1 else (2.9, '\n')  # of each: a page shows about 900 dots
    height = (0.28 * len(methods) + (0.6 if line == ', ' else 0.8)) * len(settings) + 0.6
    figure = Figure(figsize=(width * len(budgets) + margin, height), dpi=110, layout='constrained')
    axes: Any = figure.subplots(len(settings), len(budgets), squeeze=False, sharex='row', sharey=True)
    for axis, (setting, budget) in zip(axes.flat, product(settings, budgets), strict=True):
        axis.axvline(0, color='0.6', linewidth=1)
        for entry in found:
            if (entry.setting, entry.budget) == (setting, budget) and (over := entry.over_base) is not None:
                good = over.sign * (1 if study.metric.better == 'higher' else -1)
                look = {'color': _LOOKS[good][0], 'fmt': 'o', 'markersize': 4}
                half = over.half if over.count > 1 else 0.0
                axis.errorbar(over.mean, methods.index(entry.method), xerr=half, capsize=3, **look)
        axis.set_yticks(range(len(methods)), names, fontsize=9)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.tick_params(axis='x', labelsize=8)
        axis.locator_params(axis='x', nbins=6)
        axis.set_title(f'{study.labels.get(setting, setting)}{line}{_TITLES[budget]}', fontsize=9)
    metric = study.metric.name.rpartition('/')[2]
    figure.supxlabel(f'{metric}: difference from the base optimizer, 95 % interval', fontsize=9)
    dots = [Line2D([], [], color=colour, marker='o', markersize=4, label=text) for colour, text in _LOOKS.values()]
    figure.legend(handles=dots, loc='outside upper center', ncols=3, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _rho(rho: float | None) -> str:
    return '' if rho is None else f'{rho:g}'


def _text(value: Interval, form: str = '.2f') -> str:
    return f'{value.mean:{form}}' + (f' ± {value.half:.2f}' if value.count > 1 else '')


def _difference(difference: Interval | None) -> str:
    text = '' if difference is None else _text(difference, '+.2f')
    return f'**{text}**' if difference is not None and difference.sign else text
