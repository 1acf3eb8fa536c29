"""A study whose runs have not all been made: it shows what there is, and says what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mm_sharp.analysis.study import Plan, Rows, as_json, compare_what_is_there, comparisons, markdown, markdown_trials
from mm_sharp.analysis.study.statistics import interval
from tests.analysis.test_study import SETTING, plan_of


def some(plan: Plan, *lost: str, wild: str = '-') -> Rows:
    """Rows for all runs but those named; SAM is 2, or 3 at equal compute, above the base optimizer at each seed."""
    rows = Rows(plan.folder / 'results.csv')
    chosen = {'base': None, 'sam': 0.1, 'half': 0.1}
    for run in (*plan.selection_runs('clean'), *plan.report_runs('clean', chosen)):
        if not any(run.id.startswith(start) for start in lost):
            over = {'sam_rho0.1_6e': 2, 'sam_rho0.1_3e': 3, 'half_rho0.1_6e': 1}.get(run.recipe, 0)
            figure = math.nan if run.id.startswith(wild) else 10.0 * run.seed**2 + over
            rows.add(run, plan.fingerprint(run), {'digits/accuracy': figure})
    return Rows(rows.file)


def test_an_unfinished_study_compares_the_seeds_that_are_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    lost = ('report/clean/sam_rho0.1_6e_seed1', 'report/clean/sam_rho0.1_3e', 'report/clean/base_6e_seed2')
    found = compare_what_is_there(plan, some(plan, *lost, wild='report/clean/half_rho0.1_6e_seed0'))
    by = {(entry.method, entry.budget): entry for entry in found.comparisons}
    assert list(by) == [(name, 'epochs') for name in ('base', 'sam', 'half')] + [
        ('base', 'compute'),
        ('half', 'compute'),
    ]
    # The base optimizer has seeds 0 and 1, SAM 0 and 2, and half of each batch 1 and 2.
    sam = by['sam', 'epochs']
    assert (sam.mean.mean, sam.mean.count) == (22, 2)
    assert (sam.over_base, sam.over_control) == (interval([2]), interval([1]))
    assert by['half', 'epochs'].over_base == interval([1])
    assert found.trials == []
    assert found.notes == [
        'clean: 7 of 12 runs made; missing: sam_rho0.1_3e, sam_rho0.1_6e (seed 1), base_6e (seed 2)',
        'clean: diverged and left out: half_rho0.1_6e (seed 0); try a smaller rho',
    ]
    table = markdown(plan.study, found.comparisons)
    assert '**clean, equal epochs** (digits/accuracy, unfinished)' in table
    assert '| method | rho | epochs | compute | mean | over base | over half | seeds |' in table
    assert '| +2.00 | +1.00 | 2 of 3 |' in table
    assert json.loads(as_json(plan.study, found.comparisons, found.notes))['notes'] == found.notes


def test_an_unfinished_choice_of_rho_is_shown_as_such(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, metric={'name': 'digits/accuracy', 'scale': 0.001})
    rows = some(plan, 'report', 'select/clean/sam_rho0.05', 'select/clean/half_rho0.1_6e_seed101')
    found = compare_what_is_there(plan, rows)
    assert found.comparisons == []
    assert found.notes == ['clean: rho is not chosen yet: 7 of 10 runs made for it']
    table = markdown_trials(plan.study, found.trials)
    assert '**clean, choosing rho** (digits/accuracy on the validation data, unfinished)' in table
    assert [line for line in table.splitlines() if 'half' in line or 'sam' in line] == [
        '| sam | 0.05 |  | 0 of 2 |',
        '| sam | 0.1 | 101.01 | 2 of 2 |',
        '| half | 0.05 | 101.00 | 2 of 2 |',
        '| half | 0.1 | 100.00 | 1 of 2 |',
    ]


def test_a_finished_study_is_compared_the_same_and_rows_of_other_configs_are_told_of(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    rows, chosen = some(plan), {'base': None, 'sam': 0.1, 'half': 0.1}
    found = compare_what_is_there(plan, rows)
    assert (found.comparisons, found.trials, found.notes) == (comparisons(plan, rows, 'clean', chosen), [], [])
    wider = plan_of(tmp_path, settings={'clean': {**SETTING, 'options': {'model.width': 8}}})
    assert compare_what_is_there(wider, rows).notes == [
        f"clean: {count} runs were made with other configs than the study's now, {first} among them"
        for count, first in ((10, 'select/clean/base_6e_seed100'), (12, 'report/clean/base_6e_seed0'))
    ]


def test_rows_from_before_the_study_was_edited_are_counted(tmp_path: Path) -> None:
    some(plan_of(tmp_path), 'report/clean/sam', 'report/clean/half')
    edited = plan_of(tmp_path, settings={'clean': {**SETTING, 'epochs': 8}})
    found = compare_what_is_there(edited, Rows(edited.folder / 'results.csv'))
    assert found.notes == [
        '13 rows belong to other settings (made with another config), select/clean/base_6e_seed100 among them',
        'clean: rho is not chosen yet: 0 of 10 runs made for it',
    ]
