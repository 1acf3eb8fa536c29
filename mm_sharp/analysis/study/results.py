"""The file with one row for each run, and from its rows the choice of rho and the comparisons.

Intervals are Student's, for a mean of independent normal values. Two methods are compared by their difference at each
seed, since they share initial weights and order of the samples there. If the interval of the difference leaves out 0,
it is significant at 5 %, for one comparison: of twenty, one is by chance.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.spec import BASE
from mm_sharp.analysis.tables import csv_text
from mm_sharp.compat.atomic_writes import write_atomically
from mm_sharp.errors import UsageError, some

KEYS = ('id', 'phase', 'setting', 'method', 'rho', 'epochs', 'seed', 'config')
_START = 'start'  # with load_from, the fingerprint of the run whose weights it started from


class Rows:
    """The runs that have been made, in ``results.csv``: read if it exists (a UsageError if it is something else)."""

    def __init__(self, file: Path) -> None:
        # Rows were appended once: a process that was killed then has left half a line.
        reader = csv.DictReader(file.read_text().rpartition('\n')[0].splitlines() if file.is_file() else [])
        if not set(KEYS) <= set(reader.fieldnames or KEYS):
            raise UsageError(f"'{file}' is not a study's table of runs: move it away")
        self.file, self.by_id = file, {row['id']: row for row in reader}

    def config(self, run: Run) -> str | None:
        """The fingerprint of a run's config; None if the run has not been made."""
        return self.by_id.get(run.id, {}).get('config')

    def is_outdated(self, plan: Plan, run: Run) -> bool:
        """Whether a run has been made with another config than the plan's, or from weights of such a run."""
        config, start = self.config(run), self.by_id.get(run.id, {}).get(_START)
        # Older rows do not say what they started from.
        return config not in (None, plan.fingerprint(run)) or (bool(start) and start != plan.start(run))

    def add(self, run: Run, config: str, metrics: Mapping[str, float], start: str = '') -> None:
        """Write a run's row, with the fingerprints of its config and of its start, in place of an older one."""
        row = {'id': run.id, **run._asdict(), 'config': config, **({_START: start} if start else {}), **metrics}
        self.by_id[run.id] = {name: '' if value is None else str(value) for name, value in row.items()}
        write_atomically(csv_text(self.by_id.values()).encode(), self.file)

    def value(self, run: Run, metric: str) -> float:
        """A metric of a run that has been made."""
        row = self.by_id[run.id]
        if not row.get(metric):
            known = [name for name, value in row.items() if name not in (*KEYS, _START) and value]
            raise UsageError(f'metric.name: {metric!r} is not among what {run.id} gave: {", ".join(known)}')
        return float(row[metric])


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values and its 95 % interval."""

    mean: float
    half: float  # of the interval's length; infinite for a single value
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def interval(values: Sequence[float]) -> Interval:
    """The mean of finite values, of which there is at least one, and its interval."""
    count, half = len(values), math.inf
    if count > 1:
        half = float(special.stdtrit(count - 1, 0.975) * (np.std(values, ddof=1) / math.sqrt(count)))
    return Interval(float(np.mean(values)), half, count)


@dataclass(frozen=True)
class Comparison:
    """One method in one setting under one budget."""

    setting: str
    budget: str  # one of the study's
    method: str
    rho: float | None  # that was chosen; None for the base optimizer
    epochs: int
    compute: float  # cost of a run over the base optimizer's at equal epochs: by counting passes, or as measured
    mean: Interval  # of the metric, scaled
    over_base: Interval | None  # paired difference; None for the base optimizer, and without a seed in common
    over_control: Interval | None  # the same from the control
    time: float | None = None  # measured cost of its runs over the base optimizer's here: the median over the seeds


class Results(NamedTuple):
    """What the rows of a study say."""

    comparisons: list[Comparison]  # in settings whose rho is chosen
    unfinished: list[list[str]]  # pools of the other settings
    notes: list[str]  # on what is missing, has diverged or has another config


def compare(plan: Plan, rows: Rows) -> Results:
    """All that the rows of a study say, finished or not."""
    results = Results([], [], [])
    for names in chain(*plan.waves()):
        title, runs = ', '.join(names), [run for name in names for run in plan.selection_runs(name)]
        results.notes.extend(_outdated(plan, rows, title, runs))
        if (made := sum(run.id in rows.by_id for run in runs)) < len(runs):
            results.notes.append(f'{title}: rho is not chosen yet: {made} of {len(runs)} runs made for it')
            results.unfinished.append(names)
            continue
        chosen = choose_rho(plan, rows, names)
        for name in names:
            runs = [*plan.report_runs(name, chosen), *timed_runs(plan, rows, name, chosen)]
            results.notes.extend(_notes(plan, rows, name, list(dict.fromkeys(runs))))
            results.comparisons.extend(_comparisons(plan, rows, name, chosen))
    return results


def choose_rho(plan: Plan, rows: Rows, settings: Sequence[str]) -> dict[str, float | None]:
    """The best rho of each method, by the mean of the metric over a pool's selection runs, which must have been made.

    Of equally good ones the smallest is chosen, and the last if runs diverged.
    """
    metric, tried = plan.study.metric, trials(plan, settings)
    sign = 1 if metric.better == 'higher' else -1

    def quality(trial: tuple[str, float | None]) -> float:
        mean = sign * math.fsum(rows.value(run, metric.name) for run in tried[trial]) / len(tried[trial])
        return mean if math.isfinite(mean) else -math.inf

    chosen: dict[str, float | None] = dict.fromkeys(plan.study.methods)
    for method in plan.tuned & {name for setting in settings for name in plan.study.methods_in(setting)}:
        _, chosen[method] = max(sorted(trial for trial in tried if trial[0] == method), key=quality)
    return chosen


def trials(plan: Plan, settings: Sequence[str]) -> dict[tuple[str, float | None], list[Run]]:
    """The runs that choose rho in a pool of settings, by method and rho."""
    found: dict[tuple[str, float | None], list[Run]] = {}
    for run in (run for name in settings for run in plan.selection_runs(name)):
        found.setdefault((run.method, run.rho), []).append(run)
    return found


def timed_runs(plan: Plan, rows: Rows, setting: str, chosen: Mapping[str, float | None]) -> list[Run]:
    """The runs that are reported at equal time, of the methods whose time has been measured at equal epochs."""
    if 'time' not in plan.study.budgets:
        return []
    planned = _planned(plan, rows, setting, chosen, 'time')
    order = product(plan.study.seeds, planned.items())
    return [Run('report', setting, method, chosen[method], epochs, seed) for seed, (method, (epochs, _)) in order]


def _planned(
    plan: Plan, rows: Rows, setting: str, chosen: Mapping[str, float | None], budget: str
) -> dict[str, tuple[int, float]]:
    found = {}
    for method in plan.study.methods_in(setting):
        epochs = plan.epochs(setting, method, budget)
        if budget != 'time':
            found[method] = epochs, plan.compute(setting, method, epochs)
        elif (ratio := time_ratio(plan, rows, setting, method, chosen[method])) is not None:
            measured, own = epochs, 'epochs' in plan.study.changes(setting, method)
            epochs = measured if own else max(1, round(measured / ratio))
            found[method] = epochs, ratio * epochs / measured
    return found


def time_ratio(plan: Plan, rows: Rows, setting: str, method: str, rho: float | None) -> float | None:
    """Measured time of a method over the base optimizer's, at equal epochs or its own: the median over the seeds.

    None while a seed is missing, so that the epochs at equal time do not change afterwards.
    """
    own, base = (
        [Run('report', setting, name, its_rho, plan.epochs(setting, name, 'epochs'), seed) for seed in plan.study.seeds]
        for name, its_rho in ((method, rho), (BASE, None))
    )
    if not all(run.id in rows.by_id for run in (*own, *base)):
        return None
    return _median_ratio(*({run.seed: rows.value(run, 'cost_seconds') for run in runs} for runs in (own, base)))


def _comparisons(plan: Plan, rows: Rows, setting: str, chosen: dict[str, float | None]) -> list[Comparison]:
    study, found = plan.study, []
    for budget in study.budgets:
        planned = _planned(plan, rows, setting, chosen, budget)
        values: dict[str, dict[int, float]] = {}
        costs: dict[str, dict[int, float]] = {}
        for method, (epochs, _) in planned.items():
            runs = [Run('report', setting, method, chosen[method], epochs, seed) for seed in study.seeds]
            made = [run for run in runs if run.id in rows.by_id]
            of_seed = {run.seed: rows.value(run, study.metric.name) for run in made}
            values[method] = {seed: study.metric.scale * v for seed, v in of_seed.items() if math.isfinite(v)}
            costs[method] = {run.seed: float(rows.by_id[run.id].get('cost_seconds') or 'nan') for run in made}
        for method, own in ((method, own) for method, own in values.items() if own):
            base = None if method == BASE else _difference(own, values.get(BASE, {}))
            controlled = study.control and method not in (BASE, study.control)
            control = _difference(own, values.get(study.control, {})) if controlled else None
            setup = setting, budget, method, chosen[method], *planned[method]
            time = _median_ratio(costs[method], costs.get(BASE, {}))
            found.append(Comparison(*setup, interval(list(own.values())), base, control, time))
    return found


def _difference(own: dict[int, float], other: dict[int, float]) -> Interval | None:
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    return interval(pairs) if pairs else None


def _median_ratio(own: dict[int, float], other: dict[int, float]) -> float | None:
    ratios = [ratio for seed in own if seed in other and math.isfinite(ratio := own[seed] / other[seed])]
    return statistics.median(ratios) if ratios else None


def _notes(plan: Plan, rows: Rows, setting: str, runs: Sequence[Run]) -> list[str]:
    notes = _outdated(plan, rows, setting, runs)
    made = [run for run in runs if run.id in rows.by_id]
    if len(made) < len(runs):
        missing = some(Path(run.id).name for run in runs if run not in made)
        notes.append(f'{setting}: {len(made)} of {len(runs)} runs made; missing: {missing}')
    if diverged := [Path(run.id).name for run in made if not math.isfinite(rows.value(run, plan.study.metric.name))]:
        notes.append(f'{setting}: diverged and left out: {some(diverged)}; try a smaller rho')
    return notes


def _outdated(plan: Plan, rows: Rows, title: str, runs: Sequence[Run]) -> list[str]:
    old = [run.id for run in runs if rows.is_outdated(plan, run)]
    note = f"{title}: {len(old)} runs were made with other configs than the study's now, {{}} among them"
    return [note.format(first) for first in old[:1]]
