"""The tables as a bar chart (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_sharp.analysis.benchmark.phases import NAMES
from mm_sharp.analysis.benchmark.table import Table

# Paul Tol's muted colours, which colour-blind people can tell apart: the passes dark, the wrapper's own work light.
_COLOURS = dict(zip(NAMES, ('#332288', '#DDCC77', '#117733', '#CC6677', '#88CCEE', '#AA4499', '#BBBBBB'), strict=True))

_BELOW: dict[str, Any] = {
    'fontsize': 'small',
    'ncols': 4,
    'loc': 'upper center',
    'handlelength': 1,
    'columnspacing': 1,
}


def draw_chart(tables: Sequence[Table], path: Path, title: str) -> None:
    """Write a PNG: for each batch size the ratios with their quartiles and limits, and the phases of a step.

    Args:
        tables: At least one.
        path: File to write; its folder is made.
        title: Above all.
    """
    # Half a second that no other run of the tool needs. Without pyplot nothing looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = sum(1.9 + 0.42 * len(table.rows) for table in tables)
    figure = Figure(figsize=(12, height + 0.8), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    heights = [2.0 + len(table.rows) for table in tables]
    panels = figure.subplots(len(tables), 2, squeeze=False, gridspec_kw={'height_ratios': heights})
    for table, (left, right) in zip(tables, panels, strict=True):
        _draw_ratios(left, table)
        _draw_phases(right, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _legend(axes: Any, table: Table) -> None:
    """Below the axis' label, whatever the panel's height: about 0.6 inches, in panels."""
    axes.legend(**_BELOW, bbox_to_anchor=(0.5, -0.6 / (0.42 * len(table.rows) + 0.5)))


def _draw_ratios(axes: Any, table: Table) -> None:
    """Bars from 0, with the quartiles as whiskers and a line at each limit."""
    places = range(len(table.rows))
    medians = [row.ratio.median for row in table.rows]
    below = [row.ratio.median - row.ratio.low for row in table.rows]
    above = [row.ratio.high - row.ratio.median for row in table.rows]
    axes.barh(places, medians, xerr=[below, above], height=0.6, color='#88CCEE', capsize=3, label='median, quartiles')
    limited = [(row.limit, place) for place, row in zip(places, table.rows, strict=True) if row.limit is not None]
    if limited:
        limits, at = zip(*limited, strict=True)
        low, high = [place - 0.4 for place in at], [place + 0.4 for place in at]
        axes.vlines(limits, low, high, color='#332288', linewidth=2, label='theoretical cost')
    axes.set_yticks(places, [row.label for row in table.rows])
    axes.invert_yaxis()
    axes.set_xlabel('step time over the base optimizer')
    axes.set_title(f'batch size {table.batch_size}')
    _legend(axes, table)


def _draw_phases(axes: Any, table: Table) -> None:
    """One bar a method, stacked; the length is the step's, in steps of the base optimizer."""
    unit = sum(table.phases['base'].values())
    ends = dict.fromkeys(table.phases, 0.0)
    for phase in NAMES:
        lengths = [seconds[phase] / unit for seconds in table.phases.values()]
        axes.barh(list(table.phases), lengths, left=list(ends.values()), height=0.6, color=_COLOURS[phase], label=phase)
        ends = {name: end + length for (name, end), length in zip(ends.items(), lengths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel('time of a phase, base step = 1')
    axes.set_title('phases of a step between refreshes')
    _legend(axes, table)
