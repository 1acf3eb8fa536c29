"""From the rows of a study to its comparisons (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm_sharp.cli import UsageError
from mm_sharp.study.plan import Plan, Run
from mm_sharp.study.rows import Rows
from mm_sharp.study.spec import BASE
from mm_sharp.study.statistics import Interval, interval, paired


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
        over_base: Paired difference from the base optimizer; None for itself.
        over_control: Paired difference from the control; None for itself, and without one.
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


def comparisons(plan: Plan, rows: Rows, setting: str, chosen: dict[str, float | None]) -> list[Comparison]:
    """All methods in a setting, whose runs have been made, under each budget."""
    study = plan.study

    def values(method: str, epochs: int) -> list[float]:
        runs = [Run('report', setting, method, chosen[method], epochs, seed) for seed in study.seeds]
        figures = {run.id: study.metric.scale * rows.value(run, study.metric.name) for run in runs}
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise UsageError(f'{name} has diverged: its {study.metric.name} is {figure}; try a smaller rho')
        return list(figures.values())

    found = []
    for budget in study.budgets:
        epochs = {method: plan.epochs(setting, method, budget) for method in study.methods}
        of = {method: values(method, epochs[method]) for method in study.methods}
        for method, own in of.items():
            control = None if method in (BASE, study.control) or not study.control else paired(own, of[study.control])
            base = None if method == BASE else paired(own, of[BASE])
            compute = epochs[method] * plan.cost(setting, method) / study.settings[setting].epochs
            setup = setting, budget, method, chosen[method], epochs[method], compute
            found.append(Comparison(*setup, interval(own), base, control))
    return found
