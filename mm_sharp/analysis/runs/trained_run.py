"""What training runs have left in their work directories: a table, the curves of their logs, and their sharpness."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from mmengine.config import Config
from tqdm import tqdm

from mm_sharp.analysis.find_rho.measure import RhoProbe
from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.sharpness.loading import load_model, load_samples
from mm_sharp.analysis.tables import markdown_columns
from mm_sharp.cli.loading import named_checkpoint
from mm_sharp.errors import RECOMMENDED_SCALE, UsageError

Curve = Sequence[tuple[int, float]]  # iterations or epochs, and values

_METRICS = {'coco/AP': 'AP', 'PCK': 'PCK'}
_NO_METRICS = ('data_time', 'time', 'step')  # what else these entries have, beside those of _BEFORE
_BEFORE = 'post_training/'


@dataclass(frozen=True)
class TrainedRun:
    """A run of ``tools/train.py``: its config, its checkpoints and its log."""

    name: str
    folder: Path
    cfg: Config
    checkpoints: dict[int, Path]  # by epoch, in their order
    log: list[dict[str, Any]]  # MMEngine's scalars, in the order in which they were written

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return next(reversed(self.checkpoints.values()))

    def training(self, key: str) -> Curve:
        """A scalar of the training steps that were logged: iterations, and values."""
        return [(entry['step'], entry[key]) for entry in self.log if _of_training(entry) and key in entry]

    def held_out(self, key: str) -> Curve:
        """A metric on the validation data: epochs, and values."""
        return [(entry['step'], entry[key]) for entry in self.log if not _of_training(entry) and key in entry]

    def final(self, key: str) -> float | None:
        """The last value of a metric on the validation data; None if it was never measured."""
        found = self.held_out(key)
        return found[-1][1] if found else None

    def epochs_in_words(self) -> str:
        """How many epochs the checkpoints show of those that the config has."""
        planned = self.cfg.train_cfg.max_epochs
        made = max(self.checkpoints, default=planned)
        return str(planned) if made == planned else f'{made} of {planned}'

    def seconds(self) -> float:
        """Time of all training steps without loading data: the median step's, times their number."""
        steps = [entry for entry in self.log if _of_training(entry)]
        return float(median(entry['time'] - entry['data_time'] for entry in steps) * steps[-1]['step'])


def read_run(name: str, folder: Path) -> TrainedRun:
    """Read a work directory, with all logs of a run that was resumed; a UsageError: it has none, or no checkpoint.

    Of several runs that were begun in it, the last one counts.
    """
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    files = sorted(filter(_epoch, folder.glob('epoch_*.pth')), key=_epoch)
    if not logs or not files:
        missing = 'checkpoint of a whole epoch' if logs else 'log'
        raise UsageError(f"'{folder}' has no {missing}: give the --work-dir of a run of tools/train.py, by epochs")
    configs = [Config.fromfile(log.with_name('config.py'), format_python_code=False) for log in logs]
    logs = logs[max((number for number, cfg in enumerate(configs) if not cfg.get('resume')), default=0) :]
    last = _epoch(Path(named_checkpoint(folder)))
    files = [file for file in files if _epoch(file) <= last] or files  # an earlier run may have been longer
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    # What was done again after an interruption counts once.
    log = {_place(entry): entry for entry in entries}
    return TrainedRun(name, folder, configs[-1], {_epoch(file): file for file in files}, list(log.values()))


def _of_training(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the log is a training step's, which has a learning rate: of several wrappers, one of each."""
    return any(key == 'lr' or key.endswith('.lr') for key in entry)


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry of the log is of: one training step, or an epoch's metrics, which may be in several entries."""
    if _of_training(entry):
        return True, entry['step']
    return False, entry['step'], *(key for key in entry if '/' in key)


def _epoch(file: Path) -> int:
    # Not of a copy, such as the one that CheckpointHook publishes.
    match = re.fullmatch(r'epoch_(\d+)', file.stem)
    return int(match[1]) if match else 0


def held_out_metric(runs: Sequence[TrainedRun], asked: str | None) -> str | None:
    """The metric to compare the runs by: what was asked for, else AP, PCK or the first; None if nothing was evaluated.

    Raises:
        UsageError: No run has what was asked for.
    """
    entries = (entry for run in runs for entry in run.log if not _of_training(entry))
    there = dict.fromkeys(
        key for entry in entries for key in entry if key not in _NO_METRICS and not key.startswith(_BEFORE)
    )
    if asked is not None and asked not in there:
        raise UsageError(f"--metric '{asked}': no run has it; there are {', '.join(there) or 'none'}")
    return asked or next((key for key in (*_METRICS, *there) if key in there), None)


def metrics_table(runs: Sequence[TrainedRun], sharpness: Mapping[str, Curve], metric: str | None = None) -> str:
    """A row for each run, in Markdown: held-out metrics, epochs, time over the first run's, sharpness at the end.

    The metrics are AP and PCK, where a run has them, and ``metric``, by its key in the logs.
    """
    metrics = {key: title for key, title in _METRICS.items() if any(run.held_out(key) for run in runs)}
    if metric is not None:
        metrics.setdefault(metric, metric.rpartition('/')[2])
    before = [key for key in metrics if any(run.held_out(f'{_BEFORE}{key}') for run in runs)]
    table = {'run': [run.name for run in runs]}
    table |= {title: [_number(run.final(key)) for run in runs] for key, title in metrics.items()}
    if before:  # what post-training quantization gave
        key = metric if metric in before else before[0]
        table[f'{metrics[key]} before'] = [_number(run.final(f'{_BEFORE}{key}')) for run in runs]
    table['epochs'] = [run.epochs_in_words() for run in runs]
    table['time'] = [f'{run.seconds() / runs[0].seconds():.2f}' for run in runs]
    if sharpness:
        table['sharpness'] = [f'{sharpness[run.name][-1][1]:.2g}' for run in runs]
    return markdown_columns(table)


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'


def draw_curves(runs: Sequence[TrainedRun], metric: str | None, sharpness: Mapping[str, Curve], file: Path) -> None:
    """Draw three panels with a line for each run: the training loss, a held-out metric, and the sharpness.

    ``metric`` is its key in the logs, as ``coco/AP``. Without it, or without any ``sharpness``, its panel is left out.
    """
    from matplotlib.figure import Figure  # only here: nothing else needs it
    from matplotlib.ticker import LogLocator, NullFormatter

    panels: list[tuple[str, str, Mapping[str, Curve]]] = []
    panels += [('training loss', 'iteration', {run.name: _smoothed(run.training('loss')) for run in runs})]
    if metric is not None:
        panels += [(f'held-out {metric.rpartition("/")[2]}', 'epoch', {run.name: run.held_out(metric) for run in runs})]
    if sharpness:
        panels += [('sharpness, training people', 'epoch', sharpness)]
    figure = Figure(figsize=(3.3 * len(panels), 3.1), dpi=110, layout='constrained')
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, label, curves) in zip(axes, panels, strict=True):
        for name, curve in curves.items():
            if curve:
                axis.plot(*zip(*curve, strict=True), label=name, marker='o' if label == 'epoch' else '', markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.3)
        if any(curves.values()):  # a GAN's log may have no 'loss'
            axis.legend(fontsize=9)
    if all(loss > 0 for curve in panels[0][2].values() for _, loss in curve):  # RLE's, for one, falls below 0
        axes[0].set_yscale('log')
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter('{x:g}')
        axes[0].yaxis.set_minor_formatter(NullFormatter())  # all of them would lie over each other
    figure.savefig(file)


def _smoothed(curve: Curve) -> Curve:
    """Means over five entries of the log, which are of single steps and scatter."""
    return [(step, fmean(value for _, value in curve[max(0, i - 4) : i + 1])) for i, (step, _) in enumerate(curve)]


def rises(run: TrainedRun, count: int, batch_size: int = 32, rho: float = RECOMMENDED_SCALE['rho']) -> Curve:
    """L(w + e) - L(w) at each checkpoint, on at most so many training samples, with BatchNorm's running statistics.

    e is SAM's perturbation with ``adaptive='tensor'`` and ``perturb='weights'``, whatever the run was trained with.
    Returns epochs, and the mean over the batches, in units of the loss.
    """
    with prepared(run.cfg):
        samples = load_samples(run.cfg, 'train', count, seed=0, at_most=True)
    found = []
    checkpoints = tqdm(run.checkpoints.items(), f'sharpness of {run.name}', leave=False, disable=None)
    for epoch, file in checkpoints:
        model: Any = load_model(run.cfg, str(file))[0].eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        probe = RhoProbe(optimizer, [rho], adaptive='tensor', perturb='weights')
        with prepared(run.cfg, epoch):
            measured = [probe.measure(model, batch) for _, batch in samples.batches(batch_size)]
        # Where the gradient is 0, or not finite, there is no perturbation.
        found.append((epoch, fmean(math.nan if batch is None else batch.rises[0] for batch in measured)))
    return found
