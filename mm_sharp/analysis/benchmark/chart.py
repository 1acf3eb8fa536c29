"""The tables as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_sharp.analysis.benchmark.table import NAMES, Table

# Paul Tol's muted colours, which colour-blind people can tell apart: the passes dark, the wrapper's own work light.
_COLOURS = dict(zip(NAMES, ('#332288', '#DDCC77', '#117733', '#CC6677', '#88CCEE', '#AA4499', '#BBBBBB'), strict=True))


def draw_chart(tables: Sequence[Table], path: Path, title: str) -> None:
    """Write a PNG: for each batch size the ratios, their quartiles and theoretical costs, and the phases of a step."""
    # Half a second that no other run of the tool needs. Without pyplot nothing looks for a screen.
    from matplotlib.figure import Figure

    height = sum(1.9 + 0.42 * len(table.rows) for table in tables)
    figure = Figure(figsize=(12, height + 0.8), layout='constrained')
    figure.suptitle(title)
    ratios = {'height_ratios': [2.0 + len(table.rows) for table in tables]}
    panels = figure.subplots(len(tables), 2, squeeze=False, gridspec_kw=ratios)
    for table, (left, right) in zip(tables, panels, strict=True):
        _draw_ratios(left, table)
        _draw_phases(right, table)
        for axes in (left, right):
            axes.invert_yaxis()
            # Below the axis' label, whatever the panel's height: about 0.6 inches, in panels.
            below = (0.5, -0.6 / (0.42 * len(table.rows) + 0.5))
            axes.legend(fontsize='small', ncols=4, loc='upper center', handlelength=1, bbox_to_anchor=below)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_ratios(axes: Any, table: Table) -> None:
    """Bars from 0, with the quartiles as whiskers and a line at each theoretical cost."""
    ratios = [row.ratio for row in table.rows]
    medians = [ratio.median for ratio in ratios]
    spread = [[ratio.median - ratio.low for ratio in ratios], [ratio.high - ratio.median for ratio in ratios]]
    bars = dict(height=0.6, color='#88CCEE', capsize=3, label='median, quartiles')
    axes.barh(range(len(ratios)), medians, xerr=spread, **bars)
    places = [place for place, row in enumerate(table.rows) if row.theoretical is not None]
    costs = [table.rows[place].theoretical for place in places]
    ends = ([place - 0.4 for place in places], [place + 0.4 for place in places])
    axes.vlines(costs, *ends, color='#332288', linewidth=2, label='theoretical cost')
    axes.set_yticks(range(len(ratios)), [row.label for row in table.rows])
    axes.set(xlabel='step time over the base optimizer', title=f'batch size {table.batch_size}')


def _draw_phases(axes: Any, table: Table) -> None:
    """One bar a method, stacked; the length is the step's, in steps of the base optimizer."""
    unit = sum(table.phases['base'].values())
    ends = dict.fromkeys(table.phases, 0.0)
    for phase in NAMES:
        lengths = [seconds[phase] / unit for seconds in table.phases.values()]
        axes.barh(list(table.phases), lengths, left=list(ends.values()), height=0.6, color=_COLOURS[phase], label=phase)
        ends = {name: end + length for (name, end), length in zip(ends.items(), lengths, strict=True)}
    axes.set(xlabel='time of a phase, base step = 1', title='phases of most steps')
