"""What a study has to show whose runs have not all been made (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mm_sharp.analysis.study.plan import Plan, Run, order_by_need, pools
from mm_sharp.analysis.study.results import Comparison, choose_rho, comparisons, diverged
from mm_sharp.analysis.study.rows import Rows


@dataclass(frozen=True)
class Trial:
    """A method at one rho, among the runs that choose it.

    Args:
        settings: Names of the settings that share the choice.
        method: Its name.
        rho: That is tried; None for the base optimizer.
        made: Runs that have been made.
        of: Runs in all.
        mean: Of the metric over those made, in the study's scale; None if there are none.
    """

    settings: tuple[str, ...]
    method: str
    rho: float | None
    made: int
    of: int
    mean: float | None


@dataclass(frozen=True)
class SoFar:
    """What there is.

    Args:
        comparisons: Of the settings whose rho is chosen, over the seeds that are there.
        trials: Of the settings whose rho is not.
        notes: A line for all that is missing, has diverged, or belongs to another config than the study's now.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_what_is_there(plan: Plan, rows: Rows) -> SoFar:
    """All that the rows of a study say, finished or not."""
    found = SoFar(notes=_of_other_settings(plan, rows))
    for wave in order_by_need(plan.study.settings.values()):
        for names in pools(wave):
            runs = [run for name in names for run in plan.selection_runs(name)]
            title = ', '.join(names)
            found.notes.extend(_outdated(plan, rows, title, runs))
            made = sum(run.id in rows.by_id for run in runs)
            if made < len(runs):
                found.notes.append(f'{title}: rho is not chosen yet: {made} of {len(runs)} runs made for it')
                found.trials.extend(_trials(plan, rows, names, runs))
                continue
            chosen = choose_rho(plan, rows, names)
            for name in names:
                found.notes.extend(_reported(plan, rows, name, chosen))
                found.comparisons.extend(comparisons(plan, rows, name, chosen, unfinished=True))
    return found


def _trials(plan: Plan, rows: Rows, names: Sequence[str], runs: Sequence[Run]) -> list[Trial]:
    trials = []
    for method, rho in dict.fromkeys((run.method, run.rho) for run in runs):
        same = [run for run in runs if (run.method, run.rho) == (method, rho)]
        values = [rows.value(run, plan.study.metric.name) for run in same if run.id in rows.by_id]
        mean = plan.study.metric.scale * sum(values) / len(values) if values else None
        trials.append(Trial(tuple(names), method, rho, len(values), len(same), mean))
    return trials


def _reported(plan: Plan, rows: Rows, setting: str, chosen: dict[str, float | None]) -> list[str]:
    """What is to be said of the runs that are reported in a setting."""
    runs = plan.report_runs(setting, chosen)
    made = [run for run in runs if run.id in rows.by_id]
    notes = _outdated(plan, rows, setting, runs)
    if made and len(made) < len(runs):
        missing = _by_recipe(plan, [run for run in runs if run not in made])
        notes.append(f'{setting}: {len(made)} of {len(runs)} runs made; missing: {missing}')
    elif not made:
        notes.append(f'{setting}: none of {len(runs)} runs made')
    wild = [run for run in made if diverged(plan, rows, run)]
    if wild:
        notes.append(f'{setting}: diverged and left out: {_by_recipe(plan, wild)}; try a smaller rho')
    return notes


def _outdated(plan: Plan, rows: Rows, title: str, runs: Sequence[Run]) -> list[str]:
    old = [run for run in runs if run.id in rows.by_id and rows.outdated(run, plan.fingerprint(run))]
    if not old:
        return []
    return [f"{title}: {len(old)} runs were made with other configs than the study's now, {old[0].id} among them"]


def _of_other_settings(plan: Plan, rows: Rows) -> list[str]:
    """A line about rows that none of the study's runs would write, such as those from before its file was edited."""
    study = plan.study
    selecting = {run.id for name in study.settings for run in plan.selection_runs(name)}
    reported = {
        (name, method, str(plan.epochs(name, method, budget)), str(seed))
        for name in study.settings for method in study.methods for budget in study.budgets for seed in study.seeds
    }  # fmt: skip
    others = [
        row['id']
        for row in rows.by_id.values()
        if row['setting'] in study.settings  # with --settings, the file has rows of the others
        and row['id'] not in selecting
        and (
            row['phase'] != 'report'
            or tuple(row[key] for key in ('setting', 'method', 'epochs', 'seed')) not in reported
        )
    ]
    if not others:
        return []
    return [f'{len(others)} rows belong to other settings (made with another config), {others[0]} among them']


def _by_recipe(plan: Plan, runs: Sequence[Run]) -> str:
    """Runs of one setting, shortly: those of all seeds by their recipe alone."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.recipe, []).append(run.seed)
    return ', '.join(
        recipe if own == plan.study.seeds else f'{recipe} (seed {", ".join(map(str, own))})'
        for recipe, own in seeds.items()
    )
