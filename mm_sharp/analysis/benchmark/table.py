"""What was measured of the methods, as paired ratios with quartiles: as text and for files.

Phases: ``pass1`` and ``pass2`` (forward and backward; ESAM's forward for the selection is in the second), ``perturb``
(copy of the weights, gradient norm, perturbation), ``restore`` (weights, buffers, random state), ``step`` (clipping,
the base optimizer's step), ``recording`` (losses of single samples, draw, selection, history) and ``host`` (the rest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from numpy.typing import NDArray

from mm_sharp.analysis.benchmark.candidates import SUFFIX, theoretical_cost, whole_cycles
from mm_sharp.analysis.benchmark.steps import Phases, Quartiles, peak_memory, phase_seconds, quartiles, step_seconds
from mm_sharp.analysis.benchmark.workload import BATCH_SIZE, FLOAT, Settings, load_workload, small_workload
from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.tables import columns
from mm_sharp.step.method import Cost
from mm_sharp.step.timing import EXCLUDED, PHASES

NAMES = (*PHASES, *EXCLUDED)


class Row(NamedTuple):
    """What was found about one method: times of a step, and ratios to the base optimizer's in the same round."""

    label: str
    steps: int
    seconds: Quartiles
    ratio: Quartiles
    theoretical: float | None  # what the ratio is in theory
    images_per_second: float
    peak_bytes: int | None = None  # most memory at once

    @property
    def distance(self) -> float | None:
        """How far the ratio is above the theoretical cost, in percent of that."""
        return None if self.theoretical is None else 100 * (self.ratio.median / self.theoretical - 1)

    def figures(self) -> dict[str, Any]:
        """The row under the names that it has in files."""
        figures = {'limit' if key == 'theoretical' else key: value for key, value in self._asdict().items()}
        times = {'seconds': self.seconds._asdict(), 'ratio': self.ratio._asdict()}
        return {**figures, **times, 'distance_percent': self.distance}


def compare(
    times: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost | None],
    batch_size: int,
    steps_before: int = 0,
    peaks: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """One row a method; two for one that makes costlier steps at intervals: its other steps, and whole cycles.

    A cycle's quartiles are means over its steps: a median of few whole cycles would take in every disturbance. All are
    by method: ``times``, the seconds of each round's step, after ``steps_before`` others, in whole cycles; ``costs`` in
    theory, None where it says nothing; ``peaks``, most bytes.
    """
    rows, base = [], np.asarray(times['base'])
    for name, steps in times.items():
        cost, seconds, peak = costs[name], np.asarray(steps), (peaks or {}).get(name)
        costly = costlier(cost, len(steps), steps_before)
        both = seconds, seconds / base
        most = [quartiles(values[~costly]) for values in both]
        found = [(name, int((~costly).sum()), most, None if cost is None else cost.step)]
        if cost is not None and costly.any():
            pairs = zip(most, (quartiles(values[costly]) for values in both), strict=True)
            mean = [Quartiles(*np.average(pair, 0, [cost.length - 1, 1]).tolist()) for pair in pairs]
            found = [(f'{name}, most steps', *found[0][1:])]
            found.append((f'{name}, cycle of {cost.length}', len(steps), mean, cost.cycle))
        for label, count, (time, ratio), theoretical in found:
            rows.append(Row(label, count, time, ratio, theoretical, batch_size / time.median, peak))
    return rows


def costlier(cost: Cost | None, steps: int, before: int) -> NDArray[np.bool_]:
    """Which of so many steps cost more than most, (steps,): the first of every cycle, given those made before them."""
    length = 1 if cost is None else cost.length
    return np.array([length > 1 and (before + number) % length == 0 for number in range(steps)])


def step_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ('method', 'step, ms (quartiles)', 'ratio (quartiles)', 'theory', 'distance', 'images/s', 'peak, MB')
    lines = [head]
    for row in rows:
        theory = ('', '') if row.theoretical is None else (f'{row.theoretical:.3f}', f'{row.distance:+.1f} %')
        peak = 'n/a' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:.1f}'
        times = row.seconds.text(1e-3), row.ratio.text(form='.3f')
        lines.append((row.label, *times, *theory, f'{row.images_per_second:.1f}', peak))
    return columns(lines)


def run_costs(costs: Mapping[str, Cost]) -> str:
    """What whole trainings cost, as text, where the first epoch costs more than the others: else empty."""
    form = '{}: {:.2f} + {:.2f} / epochs over a training: the first epoch costs {:.2f}'
    first = [(name, cost.cycle, cost.first_epoch) for name, cost in costs.items() if cost.first_epoch is not None]
    return '\n'.join(form.format(name, cycle, most - cycle, most) for name, cycle, most in first)


class Table(NamedTuple):
    """What was measured at one batch size; by method: wrapper's config, times, phases of a typical step."""

    batch_size: int
    rounds: int
    rows: list[Row]
    phases: dict[str, Phases]
    settings: Settings
    times: dict[str, list[float]]

    def text(self) -> str:
        """For people."""
        parts = [f'batch size {self.batch_size}, {self.rounds} rounds', step_table(self.rows)]
        if FLOAT in self.times:
            ratio = quartiles(np.divide(self.times['base'], self.times[FLOAT]))
            parts.append(f'base, quantized over float: {ratio.text()}')
        whole = run_costs({name: theoretical_cost(o, self.batch_size) for name, o in self.settings.items()})
        parts += [whole] if whole else []
        own = own_work(self.times)
        if own:
            lines = [(name, found.text(0.01, '+.1f')) for name, found in own.items()]
            parts += ['', columns([('more than the passes alone', '% of a base step (quartiles)'), *lines])]
        return '\n'.join([*parts, '', phase_table(self.phases)])

    def figures(self) -> dict[str, Any]:
        """For programs: plain types."""
        settings, phases = self.settings.get, self.phases.get
        methods = [
            {'method': name, 'optim_wrapper': settings(name), 'seconds': times, 'phase_seconds': phases(name)}
            for name, times in self.times.items()
        ]
        own = {name: found._asdict() for name, found in own_work(self.times).items()}
        rows = [row.figures() for row in self.rows]
        return {'batch_size': self.batch_size, 'rounds': self.rounds, 'rows': rows, 'methods': methods, 'own_work': own}


def measure_table(
    cfg: Config, settings: Settings, batch_size: int, rounds: int, warmup: int, *, passes_only: bool = False
) -> Table:
    """Measure all methods: step times first, then memory, then phases, each in steps of their own.

    ``settings`` are the configs of the methods' optimizer wrappers, by name, with ``'base'``. ``rounds`` of timed steps
    become whole cycles, after at least one for ``warmup``. ``passes_only``: the passes of each method alone, too.

    Raises UsageError: The data are less than a batch, a method does not work with this model, or a loss is not finite.
    """
    settings = {name: dict(own) for name, own in settings.items()}
    costs: dict[str, Any] = {name: theoretical_cost(own, batch_size) for name, own in settings.items()}
    # Of the steps with marks there are fewer: their shares scatter less than the ratios' distances matter.
    rounds, few = whole_cycles(rounds, costs), whole_cycles(-(-rounds // 4), costs)
    lengths = {name: cost.length for name, cost in costs.items()} | {FLOAT: 1}
    with prepared(cfg):
        workload = load_workload(cfg, batch_size)
        if workload.float_model is not None:
            settings, costs = {FLOAT: settings['base'], **settings}, {FLOAT: None, **costs}
        times = workload.measure(settings, rounds, warmup, step_seconds, passes_only)
        peaks = {
            name: peak_memory(partial(workload.candidate, name, own), workload.batches[0], lengths[name])
            for name, own in settings.items()
        }
        marked = workload.measure(settings, few, warmup, phase_seconds)
    phases = {name: typical(steps, costs[name], done=warmup) for name, steps in marked.items()}
    rows = compare(times, {name: costs[name.removesuffix(SUFFIX)] for name in times}, batch_size, warmup, peaks)
    return Table(batch_size, rounds, rows, phases, settings, times)


def typical(steps: Sequence[Phases], cost: Cost | None, done: int) -> Phases:
    """The median of each phase's seconds, without the steps that cost more than others; ``done`` were made before."""
    common = ~costlier(cost, len(steps), done)
    return {phase: float(np.median(np.array([step[phase] for step in steps])[common])) for phase in NAMES}


def phase_table(phases: Mapping[str, Phases]) -> str:
    """Each phase's share of its method's step, as text."""
    lines = [['share of a step, %', *NAMES]]
    for name, seconds in phases.items():
        total = sum(seconds.values())
        lines.append([name, *(f'{100 * seconds[phase] / total:.1f}' for phase in NAMES)])
    return columns(lines)


def own_work(times: Mapping[str, Sequence[float]]) -> dict[str, Quartiles]:
    """What each method's step takes more than its passes alone in the same round, in base steps, by method."""
    seconds = {name: np.asarray(steps) for name, steps in times.items()}
    methods = [name for name in seconds if name + SUFFIX in seconds]
    return {name: quartiles((seconds[name] - seconds[name + SUFFIX]) / seconds['base']) for name in methods}


def measure_host(
    methods: Mapping[str, Mapping[str, Any]], rounds: int, warmup: int, *, passes_only: bool = False
) -> list[Row]:
    """The host's own time of a step, which users of small models pay: on :class:`SmallModel` a step is little else."""
    optimizer = {'type': 'SGD', 'lr': 0.0, 'momentum': 0.9}
    settings = {name: {**method, 'optimizer': optimizer} for name, method in methods.items()}
    costs = {name: theoretical_cost(own, BATCH_SIZE) for name, own in settings.items()}
    workload = small_workload()
    with prepared(Config()):
        times = workload.measure(settings, whole_cycles(rounds, costs), warmup, step_seconds, passes_only)
    return compare(times, {name: costs[name.removesuffix(SUFFIX)] for name in times}, BATCH_SIZE, warmup)
