"""The table of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mm_sharp.analysis.runs.trained_run import Curve, TrainedRun
from mm_sharp.analysis.tables import markdown_table

_METRICS = {'coco/AP': 'AP', 'PCK': 'PCK'}


def metrics_table(runs: Sequence[TrainedRun], sharpness: Mapping[str, Curve]) -> str:
    """A row for each run, in Markdown: held-out metrics, epochs, time over the first run's, and sharpness at the end.

    A column says what post-training quantization gave, where runs were of quantized models.
    """
    metrics = {key: title for key, title in _METRICS.items() if any(run.held_out(key) for run in runs)}
    before = any(run.held_out(f'post_training/{key}') for run in runs for key in metrics)
    head = [
        'run',
        *metrics.values(),
        *(['AP before'] if before else []),
        'epochs',
        'time',
        *(['sharpness'] if sharpness else []),
    ]
    lines = [head]
    for run in runs:
        cells = [run.name, *(_number(run.final(key)) for key in metrics)]
        if before:
            cells.append(_number(run.final('post_training/coco/AP')))
        cells += [str(run.cfg.train_cfg.max_epochs), f'{run.seconds() / runs[0].seconds():.2f}']
        if sharpness:
            cells.append(f'{sharpness[run.name][-1][1]:.2g}')
        lines.append(cells)
    return markdown_table(lines)


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'
