"""The logs of runs as curves: the training loss, a metric on held-out data, and the sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_sharp.analysis.runs.trained_run import Curve, TrainedRun


def draw_curves(runs: Sequence[TrainedRun], metric: str, sharpness: Mapping[str, Curve], file: Path) -> None:
    """Draw three panels with a line for each run.

    Args:
        runs: The runs.
        metric: Key of the held-out metric in their logs, as ``coco/AP``.
        sharpness: By run, epochs and L(w + e) - L(w); without any, the panel is left out.
        file: The picture to write.
    """
    from matplotlib.figure import Figure  # only here: nothing else needs it
    from matplotlib.ticker import NullFormatter

    panels = [
        ('training loss', 'iteration', {run.name: _smoothed(run.training('loss')) for run in runs}),
        (f'held-out {metric.rpartition("/")[2]}', 'epoch', {run.name: run.held_out(metric) for run in runs}),
        *([('sharpness, training people', 'epoch', sharpness)] if sharpness else []),
    ]
    figure = Figure(figsize=(3.3 * len(panels), 3.1), dpi=110, layout='constrained')
    axes: Any = figure.subplots(1, len(panels))
    for axis, (title, label, curves) in zip(axes, panels, strict=True):
        for name, curve in curves.items():
            if curve:
                axis.plot(*zip(*curve, strict=True), label=name, marker='o' if label == 'epoch' else '', markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    axes[0].set_yscale('log')
    axes[0].yaxis.set_minor_formatter(NullFormatter())  # all of them would lie over each other
    figure.savefig(file)


def _smoothed(curve: Curve, window: int = 5) -> Curve:
    """Means over so many entries of the log, which are of single steps and scatter."""
    values = [value for _, value in curve]
    means = [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]
