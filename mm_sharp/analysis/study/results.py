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
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from scipy import special

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.spec import BASE
from mm_sharp.errors import UsageError, some

KEYS = ('id', 'phase', 'setting', 'method', 'rho', 'epochs', 'seed', 'config')


class Rows:
    """The runs that have been made.

    Args:
        file: ``results.csv``. It is read if it exists, and written with each new row.

    Raises:
        UsageError: The file is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.by_id: dict[str, dict[str, str]] = {}
        self._columns = list(KEYS)
        if not file.is_file() or not file.stat().st_size:
            return
        # Rows were appended once: a process that was killed then has left half a line.
        whole, _, _ = file.read_text().rpartition('\n')
        reader = csv.DictReader(whole.splitlines())
        self._columns = list(reader.fieldnames or [])
        if not set(KEYS) <= set(self._columns):
            raise UsageError(f"'{file}' is not a study's table of runs: move it away")
        self.by_id = {row['id']: row for row in reader}

    def config(self, run: Run) -> str | None:
        """The fingerprint of a run's config; None if the run has not been made."""
        return self.by_id.get(run.id, {}).get('config')

    def add(self, run: Run, config: str, metrics: Mapping[str, float]) -> None:
        """Write a run's row, with the fingerprint of its config, in place of an older one."""
        row = {'id': run.id, **asdict(run), 'config': config, **metrics}
        self.by_id[run.id] = {name: '' if value is None else str(value) for name, value in row.items()}
        self._columns += [name for name in row if name not in self._columns]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix('.tmp')
        with draft.open('w', newline='') as stream:
            writer = csv.DictWriter(stream, self._columns, restval='', lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.by_id.values())
        draft.replace(self.file)

    def value(self, run: Run, metric: str) -> float:
        """A metric of a run that has been made."""
        row = self.by_id[run.id]
        if not row.get(metric):
            known = [name for name, value in row.items() if name not in KEYS and value]
            raise UsageError(f'metric.name: {metric!r} is not among what {run.id} gave: {", ".join(known)}')
        return float(row[metric])


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    half: float  # of the interval's length; infinite for a single value
    count: int  # of values

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def interval(values: Sequence[float]) -> Interval:
    """The mean of finite values, of which there is at least one, and its interval."""
    array, count = np.asarray(values, np.float64), len(values)
    if count == 1:
        return Interval(float(array[0]), math.inf, 1)
    error = array.std(ddof=1) / math.sqrt(count)
    return Interval(float(array.mean()), float(special.stdtrit(count - 1, 0.975) * error), count)


@dataclass(frozen=True)
class Comparison:
    """One method in one setting under one budget."""

    setting: str
    budget: str  # 'epochs' or 'compute'
    method: str
    rho: float | None  # that was chosen; None for the base optimizer
    epochs: int
    compute: float  # cost of a run over the base optimizer's at equal epochs: by counting passes, or as measured
    mean: Interval  # of the metric, scaled
    over_base: Interval | None  # paired difference; None for the base optimizer, and without a seed in common
    over_control: Interval | None  # the same from the control


@dataclass(frozen=True)
class Results:
    """What the rows of a study say."""

    comparisons: list[Comparison] = field(default_factory=list)  # in settings whose rho is chosen
    unfinished: list[list[str]] = field(default_factory=list)  # pools of the other settings
    notes: list[str] = field(default_factory=list)  # on what is missing, has diverged or has another config


def compare(plan: Plan, rows: Rows) -> Results:
    """All that the rows of a study say, finished or not."""
    results = Results()
    for names in chain(*plan.waves()):
        title, runs = ', '.join(names), [run for name in names for run in plan.selection_runs(name)]
        results.notes.extend(_outdated(plan, rows, title, runs))
        made = sum(run.id in rows.by_id for run in runs)
        if made < len(runs):
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
    """The best rho of each method, by the mean of the metric over a pool's settings and the seeds of the selection.

    All of these runs must have been made. Of equally good ones the smallest is chosen, and the last if runs diverged.
    """
    study = plan.study
    runs = [run for name in settings for run in plan.selection_runs(name)]
    sign = 1 if study.metric.better == 'higher' else -1

    def quality(method: str, rho: float) -> float:
        same = [run for run in runs if (run.method, run.rho) == (method, rho)]
        mean = sign * math.fsum(rows.value(run, study.metric.name) for run in same) / len(same)
        return mean if math.isfinite(mean) else -math.inf

    chosen: dict[str, float | None] = dict.fromkeys(study.methods)
    for method in study.methods:
        if study.selection is not None and plan.has_rho(method):
            tried = {rho: quality(method, rho) for rho in sorted(study.selection.candidates(method))}
            chosen[method] = max(tried, key=tried.__getitem__)
    return chosen


def timed_runs(plan: Plan, rows: Rows, setting: str, chosen: Mapping[str, float | None]) -> list[Run]:
    """The runs that are reported at equal time, of the methods whose time has been measured at equal epochs."""
    study = plan.study
    if 'time' not in study.budgets:
        return []
    costs = {method: measured_cost(plan, rows, setting, method, chosen[method]) for method in study.methods}
    return [
        Run('report', setting, method, chosen[method], plan.epochs(setting, method, 'time', cost), seed)
        for seed in study.seeds
        for method, cost in costs.items()
        if cost is not None
    ]


def measured_cost(plan: Plan, rows: Rows, setting: str, method: str, rho: float | None) -> float | None:
    """Measured cost of an epoch, in those of the base optimizer: median over seeds of the ratio at equal epochs.

    None while a seed is missing, so that the epochs at equal time do not change afterwards.
    """
    epochs, ratios = plan.study.settings[setting].epochs, []
    for seed in plan.study.seeds:
        pair = Run('report', setting, method, rho, epochs, seed), Run('report', setting, BASE, None, epochs, seed)
        if not all(run.id in rows.by_id for run in pair):
            return None
        own, base = (rows.value(run, 'cost_seconds') for run in pair)
        ratios.append(own / base)
    return statistics.median(ratios)


def _comparisons(plan: Plan, rows: Rows, setting: str, chosen: dict[str, float | None]) -> list[Comparison]:
    """All methods that have a finite result in a setting, under each budget."""
    study, found = plan.study, []
    for budget in study.budgets:
        costs = {method: _cost(plan, rows, setting, method, chosen[method], budget) for method in study.methods}
        known = {method: cost for method, cost in costs.items() if cost is not None}
        epochs = {method: plan.epochs(setting, method, budget, cost) for method, cost in known.items()}
        values: dict[str, dict[int, float]] = {BASE: {}}
        for method in known:
            runs = [Run('report', setting, method, chosen[method], epochs[method], seed) for seed in study.seeds]
            of_seed = {run.seed: rows.value(run, study.metric.name) for run in runs if run.id in rows.by_id}
            values[method] = {seed: study.metric.scale * v for seed, v in of_seed.items() if math.isfinite(v)}
        for method, own in values.items():
            if own:
                compute = epochs[method] * known[method] / study.settings[setting].epochs
                base = None if method == BASE else _difference(own, values[BASE])
                controlled = study.control and method not in (BASE, study.control)
                control = _difference(own, values.get(study.control, {})) if controlled else None
                setup = setting, budget, method, chosen[method], epochs[method], compute
                found.append(Comparison(*setup, interval(list(own.values())), base, control))
    return found


def _cost(plan: Plan, rows: Rows, setting: str, method: str, rho: float | None, budget: str) -> float | None:
    counted = plan.cost[setting, method]
    return measured_cost(plan, rows, setting, method, rho) if budget == 'time' else counted


def _difference(own: dict[int, float], other: dict[int, float]) -> Interval | None:
    """The paired difference over the seeds that both have."""
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    return interval(pairs) if pairs else None


def _notes(plan: Plan, rows: Rows, setting: str, runs: Sequence[Run]) -> list[str]:
    """What is to be said of the runs that are reported in a setting."""
    notes = _outdated(plan, rows, setting, runs)
    made = [run for run in runs if run.id in rows.by_id]
    if len(made) < len(runs):
        missing = some(run.name for run in runs if run not in made)
        notes.append(f'{setting}: {len(made)} of {len(runs)} runs made; missing: {missing}')
    diverged = [run.name for run in made if not math.isfinite(rows.value(run, plan.study.metric.name))]
    if diverged:
        notes.append(f'{setting}: diverged and left out: {some(diverged)}; try a smaller rho')
    return notes


def _outdated(plan: Plan, rows: Rows, title: str, runs: Sequence[Run]) -> list[str]:
    old = [run for run in runs if rows.config(run) not in (None, plan.fingerprint(run))]
    if not old:
        return []
    return [f"{title}: {len(old)} runs were made with other configs than the study's now, {old[0].id} among them"]
