"""All that is measured of the methods at one batch size.

Phases of a step: ``pass1`` and ``pass2`` (forward and backward; ESAM's forward for the selection is in the second),
``perturb`` (copy of the weights, gradient norm, perturbation), ``restore`` (weights, buffers, random state), ``step``
(clipping, the base optimizer's step, the gradients' end), ``recording`` (losses of single samples, draw, selection,
history) and ``host`` (everything else).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mmengine.config import Config

from mm_sharp.analysis.benchmark.compare import Row, columns, compare, costlier, quartiles, run_costs, step_table
from mm_sharp.analysis.benchmark.memory import peak_memory
from mm_sharp.analysis.benchmark.methods import theoretical_cost
from mm_sharp.analysis.benchmark.passes_only import SUFFIX, own_work
from mm_sharp.analysis.benchmark.steps import Phases, phase_seconds, step_seconds
from mm_sharp.analysis.benchmark.workload import FLOAT, Settings, load_workload
from mm_sharp.analysis.prepare import prepared
from mm_sharp.step.method import Cost
from mm_sharp.step.timing import EXCLUDED, PHASES

NAMES = (*PHASES, *EXCLUDED)


@dataclass(frozen=True)
class Table:
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
        keys = ('method', 'optim_wrapper', 'seconds', 'phase_seconds')
        times, settings, phases = self.times, self.settings, self.phases
        methods = [
            dict(zip(keys, (name, settings.get(name), times[name], phases.get(name)), strict=True)) for name in times
        ]
        own = {name: found._asdict() for name, found in own_work(self.times).items()}
        rows = [row.figures() for row in self.rows]
        return {'batch_size': self.batch_size, 'rounds': self.rounds, 'rows': rows, 'methods': methods, 'own_work': own}


def measure_table(
    cfg: Config, settings: Settings, batch_size: int, rounds: int, warmup: int, *, passes_only: bool = False
) -> Table:
    """Measure all methods: step times first, then memory, then phases, each in steps of their own.

    Args:
        cfg: The whole training config, whose data files are there.
        settings: Config of each method's optimizer wrapper, by name; all are compared with ``'base'``.
        batch_size: Samples a step.
        rounds: Timed steps of each method, at least; it becomes whole cycles.
        warmup: Steps of each method before, at least 1.
        passes_only: Time the passes of each method alone, too.

    Raises:
        UsageError: The data are less than a batch, a method does not work with this model, or a loss is not finite.
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
        marked = workload.measure(settings, few, 1, phase_seconds)
    phases = {name: typical(steps, costs[name], done=1) for name, steps in marked.items()}
    rows = compare(times, {name: costs[name.removesuffix(SUFFIX)] for name in times}, batch_size, warmup, peaks)
    return Table(batch_size, rounds, rows, phases, settings, times)


def whole_cycles(rounds: int, costs: Mapping[str, Cost]) -> int:
    """At least so many rounds, so that every method's cycles are whole."""
    cycles = math.lcm(*(cost.length for cost in costs.values()))
    return -(-rounds // cycles) * cycles


def typical(steps: Sequence[Phases], cost: Cost | None, done: int) -> Phases:
    """The median of each phase's seconds, without the steps that cost more than others; ``done`` were made before."""
    skipped = costlier(cost, len(steps), done)
    common = [step for step, is_skipped in zip(steps, skipped, strict=True) if not is_skipped]
    return {phase: float(np.median([step[phase] for step in common])) for phase in NAMES}


def phase_table(phases: Mapping[str, Phases]) -> str:
    """Each phase's share of its method's step, as text."""
    lines = [['share of a step, %', *NAMES]]
    for name, seconds in phases.items():
        total = sum(seconds.values())
        lines.append([name, *(f'{100 * seconds[phase] / total:.1f}' for phase in NAMES)])
    return columns(lines)
