"""From the rows of a study to its comparisons (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.rows import Rows
from mm_sharp.analysis.study.spec import BASE
from mm_sharp.analysis.study.statistics import Interval, interval, paired
from mm_sharp.errors import UsageError


@dataclass(frozen=True)
class Comparison:
    """One method in one setting under one budget.

    Args:
        setting: Its name.
        budget: ``'epochs'`` or ``'compute'``.
        method: Its name.
        rho: That was chosen; None for the base optimizer.
        epochs: Of its runs.
        compute: Of its runs by arithmetic, over the base optimizer's at equal epochs.
        mean: Of the metric, in the study's scale.
        over_base: Paired difference from the base optimizer; None for itself, and without a seed in common.
        over_control: Paired difference from the control; None likewise, and without a control.
    """

    setting: str
    budget: str
    method: str
    rho: float | None
    epochs: int
    compute: float
    mean: Interval
    over_base: Interval | None
    over_control: Interval | None


def choose_rho(plan: Plan, rows: Rows, settings: Sequence[str]) -> dict[str, float | None]:
    """The rho of each method that is best on the validation data, by the mean over the settings of a pool and seeds.

    Of equal ones the smaller.

    Args:
        plan: The study.
        rows: The runs made; those of the selection are all there.
        settings: Names of the pool's settings.
    """
    study = plan.study
    chosen: dict[str, float | None] = dict.fromkeys(study.methods)
    runs = [run for name in settings for run in plan.selection_runs(name)]
    sign = 1 if study.metric.better == 'higher' else -1
    for method in study.methods:
        if not plan.has_rho(method) or study.selection is None:
            continue
        values = {
            rho: [sign * rows.value(run, study.metric.name) for run in runs if (run.method, run.rho) == (method, rho)]
            for rho in sorted(study.selection.rho)
        }
        # A run that has diverged may have no finite figure: its rho is not chosen.
        means = {rho: math.fsum(v) / len(v) for rho, v in values.items()}
        chosen[method] = max(means, key=lambda rho: means[rho] if math.isfinite(means[rho]) else -math.inf)
    return chosen


def comparisons(
    plan: Plan, rows: Rows, setting: str, chosen: dict[str, float | None], *, unfinished: bool = False
) -> list[Comparison]:
    """All methods in a setting under each budget.

    Args:
        plan: The study.
        rows: The runs made.
        setting: Its name.
        chosen: The rho of each method.
        unfinished: Take the seeds that are there, without those that have diverged; differences are over the seeds that
            both methods have. A method without any is left out.

    Raises:
        UsageError: A run has diverged.
    """
    study = plan.study

    def values(method: str, epochs: int) -> dict[int, float]:
        runs = [Run('report', setting, method, chosen[method], epochs, seed) for seed in study.seeds]
        if unfinished:
            runs = [run for run in runs if run.id in rows.by_id and not diverged(plan, rows, run)]
        for run in runs:
            if diverged(plan, rows, run):
                figure = rows.value(run, study.metric.name)
                raise UsageError(
                    f'{run.id} has diverged: its {study.metric.name} is {figure}; try a smaller rho (--table shows the '
                    'others)'
                )
        return {run.seed: study.metric.scale * rows.value(run, study.metric.name) for run in runs}

    found = []
    for budget in study.budgets:
        epochs = {method: plan.epochs(setting, method, budget) for method in study.methods}
        of = {method: values(method, epochs[method]) for method in study.methods}
        for method, own in of.items():
            if not own:
                continue
            control = None if method in (BASE, study.control) or not study.control else _over(own, of[study.control])
            base = None if method == BASE else _over(own, of[BASE])
            compute = epochs[method] * plan.cost(setting, method) / study.settings[setting].epochs
            setup = setting, budget, method, chosen[method], epochs[method], compute
            found.append(Comparison(*setup, interval(list(own.values())), base, control))
    return found


def diverged(plan: Plan, rows: Rows, run: Run) -> bool:
    """Whether a run that has been made has no finite figure."""
    return not math.isfinite(rows.value(run, plan.study.metric.name))


def _over(own: dict[int, float], other: dict[int, float]) -> Interval | None:
    """The paired difference over the seeds that both have; None where there is none."""
    both = [seed for seed in own if seed in other]
    return paired([own[seed] for seed in both], [other[seed] for seed in both]) if both else None
