"""The rows of a study, the choice of rho, means with intervals, and the tables, of finished and unfinished studies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_sharp.analysis.study import (
    Plan,
    Rows,
    Run,
    choose_rho,
    compare,
    content,
    markdown,
    markdown_trials,
    plot,
    read_study,
)
from mm_sharp.analysis.study.results import interval, time_ratio, timed_runs
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.studies import SETTING, filled, plan_of


def test_the_published_rows_can_be_read_and_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = [Rows(ROOT / 'docs' / 'data' / f'study_{name}.csv') for name in ('digits', 'keypoints')]
    assert [len(one.by_id) for one in rows] == [252, 447]
    assert rows[0].value(Run('select', 'clean', 'sam', 0.05, 20, 100), 'digits/accuracy') == 98.98989898989899
    plan = Plan(read_study(ROOT / 'configs/study/digits.yaml'), ROOT / 'work_dirs')
    runs = [run for name in plan.study.settings for run in plan.selection_runs(name)]
    assert [rows[0].config(run) for run in runs] == [plan.fingerprint(run) for run in runs]


def test_rows_are_there_again_after_a_file_was_cut_off(tmp_path: Path) -> None:
    file, runs = tmp_path / 'results.csv', plan_of(tmp_path).selection_runs('clean')
    rows = Rows(file)
    for number, run in enumerate(runs[:3]):
        rows.add(run, 'abc', {'digits/accuracy': 90.0 + number, 'steps': 60})
    text = file.read_text()
    file.write_text(text[: len(text) - 4])
    again = Rows(file)
    assert file.read_text() == text[: len(text) - 4]  # who only reads leaves the file alone
    assert [again.config(run) for run in runs[:4]] == ['abc', 'abc', None, None]
    again.add(runs[2], 'abc', {'digits/accuracy': 50.0})
    assert Rows(file).value(runs[2], 'digits/accuracy') == 50.0
    assert Rows(file).value(runs[0], 'digits/accuracy') == 90.0


def test_a_row_of_another_config_is_replaced(tmp_path: Path) -> None:
    rows, run = Rows(tmp_path / 'results.csv'), Run('report', 'clean', 'sam', 0.1, 6, 0)
    rows.add(run, 'old', {'a': 1.0})
    rows.add(run, 'new', {'b': 2.0})
    assert rows.config(run) == 'new'
    assert len(rows.file.read_text().splitlines()) == 2
    with pytest.raises(UsageError, match=r"'a' is not among what report/clean/sam_rho0\.1_6e_seed0 gave: b"):
        rows.value(run, 'a')


def test_a_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'results.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UsageError, match="is not a study's table of runs"):
        Rows(tmp_path / 'results.csv')


# ---------------------------------------------------------------- statistics, and the choice of rho
def test_intervals_are_students() -> None:
    # Table of t: 2.776 for 4 degrees of freedom; the standard deviation of 1 to 5 is sqrt(2.5).
    found = interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert interval([7]).half == math.inf
    assert [interval(v).sign for v in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.5], [4])] == [1, -1, 0, 0]


def test_intervals_hold_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).normal(loc=2.0, size=(2000, 5))
    held = [abs(found.mean - 2.0) <= found.half for found in map(interval, draws)]
    assert 0.935 < np.mean(held) < 0.965


def test_rho_is_the_best_on_the_mean_of_its_pool_whatever_is_reported(tmp_path: Path) -> None:
    settings = {'a': {**SETTING, 'pool': 'p'}, 'b': {**SETTING, 'pool': 'p'}}
    good = {('a', 0.05): 90.0, ('a', 0.1): 91.0, ('b', 0.05): 80.0, ('b', 0.1): 70.0}

    def value(run: Run) -> float:
        return run.seed if run.phase == 'report' else good.get((run.setting, run.rho), 50.0) + run.seed % 2  # type: ignore[arg-type]

    plan = plan_of(tmp_path, settings=settings)
    rows = filled(plan, value)
    assert choose_rho(plan, rows, ['a', 'b']) == {'base': None, 'sam': 0.05, 'half': 0.05}
    assert choose_rho(plan, rows, ['a'])['sam'] == 0.1

    settings['b']['selects'] = False
    plan = plan_of(tmp_path, settings=settings)
    assert {run.method for run in plan.selection_runs('b')} == {'base'}
    assert choose_rho(plan, filled(plan, value), ['a', 'b'])['sam'] == 0.1


def test_rho_follows_the_metrics_sense_and_leaves_out_what_diverged(tmp_path: Path) -> None:
    lower = plan_of(tmp_path, metric={'name': 'digits/accuracy', 'better': 'lower'})
    assert choose_rho(lower, filled(lower, lambda run: run.rho or 0.0), ['clean'])['sam'] == 0.05
    tied = plan_of(tmp_path)
    assert choose_rho(tied, filled(tied, lambda run: 1.0), ['clean'])['sam'] == 0.05
    diverged = filled(tied, lambda run: 1.0, wild='select/clean/sam_rho0.05_6e_seed101')
    assert choose_rho(tied, diverged, ['clean'])['sam'] == 0.1


# ---------------------------------------------------------------- comparisons
def test_comparisons_pair_the_seeds_and_scale(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, metric={'name': 'digits/accuracy', 'scale': 100.0})
    more = {('sam', 6): 0.02, ('sam', 3): -0.01, ('half', 6): 0.01}
    noise = {('sam', 0): 0.001, ('sam', 1): -0.001}

    def value(run: Run) -> float:
        if run.phase == 'select':
            return run.rho or 0.0
        return 0.5 + 0.1 * run.seed + more.get((run.method, run.epochs), 0) + noise.get((run.method, run.seed), 0)

    results = compare(plan, filled(plan, value))
    found = results.comparisons
    by = {(entry.method, entry.budget): entry for entry in found}
    assert (len(found), results.unfinished, results.notes) == (6, [], [])
    assert by['base', 'epochs'].mean.mean == pytest.approx(60)
    assert by['base', 'epochs'].over_base is None
    sam, short = by['sam', 'epochs'], by['sam', 'compute']
    assert (sam.over_base.mean, short.over_base.mean) == (pytest.approx(2), pytest.approx(-1))  # type: ignore[union-attr]
    # The seeds differ by 10, the pairs by 0.1 only.
    assert sam.mean.half > 20 > 1 > sam.over_base.half  # type: ignore[union-attr]
    assert sam.over_control.mean == pytest.approx(1)  # type: ignore[union-attr]
    assert by['half', 'epochs'].over_control is None
    assert (sam.compute, short.compute, by['half', 'compute'].compute) == (2, 1, 1)

    table = markdown(plan.study, found)
    assert '**clean, equal epochs** (digits/accuracy, 3 seeds)' in table
    assert '| sam | 0.1 | 6 | 2.00 | 62.00 ± ' in table
    assert '**+2.00 ± 0.25**' in table
    assert content(plan.study, found)['comparisons'][1]['method'] == 'sam'
    plot(plan.study, found, tmp_path / 'plots' / 'differences.png')
    assert (tmp_path / 'plots' / 'differences.png').read_bytes().startswith(b'\x89PNG')


def squares(run: Run) -> float:
    """SAM is 2, or 3 at equal compute, above the base optimizer at each seed."""
    over = {('sam', 0.1, 6): 2, ('sam', 0.1, 3): 3, ('half', 0.1, 6): 1}.get((run.method, run.rho, run.epochs), 0)  # type: ignore[arg-type]
    return 10.0 * run.seed**2 + over


def test_an_unfinished_study_compares_the_seeds_that_are_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    lost = ('report/clean/sam_rho0.1_6e_seed1', 'report/clean/sam_rho0.1_3e', 'report/clean/base_6e_seed2')
    found = compare(plan, filled(plan, squares, *lost, wild='report/clean/half_rho0.1_6e_seed0'))
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
    assert found.unfinished == []
    short = 'sam_rho0.1_3e_seed0, sam_rho0.1_6e_seed1, sam_rho0.1_3e_seed1, base_6e_seed2 and 1 more'
    assert found.notes == [
        f'clean: 7 of 12 runs made; missing: {short}',
        'clean: diverged and left out: half_rho0.1_6e_seed0; try a smaller rho',
    ]
    table = markdown(plan.study, found.comparisons)
    assert '**clean, equal epochs** (digits/accuracy, unfinished)' in table
    assert '| method | rho | epochs | compute | mean | over base | over half | seeds |' in table
    assert '| +2.00 | +1.00 | 2 of 3 |' in table
    assert content(plan.study, found.comparisons, found.notes)['notes'] == found.notes


def test_an_unfinished_choice_of_rho_is_shown_as_such(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, metric={'name': 'digits/accuracy', 'scale': 0.001})
    rows = filled(plan, squares, 'report', 'select/clean/sam_rho0.05', 'select/clean/half_rho0.1_6e_seed101')
    found = compare(plan, rows)
    assert (found.comparisons, found.unfinished) == ([], [['clean']])
    assert found.notes == ['clean: rho is not chosen yet: 7 of 10 runs made for it']
    table = markdown_trials(plan, rows, ['clean'])
    assert '**clean, choosing rho** (digits/accuracy on the validation data, unfinished)' in table
    assert [line for line in table.splitlines() if 'half' in line or 'sam' in line] == [
        '| sam | 0.05 |  | 0 of 2 |',
        '| sam | 0.1 | 101.01 | 2 of 2 |',
        '| half | 0.05 | 101.00 | 2 of 2 |',
        '| half | 0.1 | 100.00 | 1 of 2 |',
    ]


def test_rows_of_other_configs_are_told_of(tmp_path: Path) -> None:
    rows = filled(plan_of(tmp_path), squares)
    wider = plan_of(tmp_path, settings={'clean': {**SETTING, 'options': {'model.width': 8}}})
    assert compare(wider, rows).notes == [
        f"clean: {count} runs were made with other configs than the study's now, {first} among them"
        for count, first in ((10, 'select/clean/base_6e_seed100'), (12, 'report/clean/base_6e_seed0'))
    ]


def test_runs_from_weights_of_another_config_are_outdated(tmp_path: Path) -> None:
    settings = {'clean': {**SETTING, 'epochs': 1}, 'tuned': {**SETTING, 'load_from': 'clean'}}
    plan = plan_of(tmp_path, settings=settings, selection=None)
    run, rows = plan.report_runs('tuned', dict.fromkeys(plan.study.methods))[0], Rows(tmp_path / 'rows.csv')
    rows.add(run, plan.fingerprint(run), {}, plan.start(run))
    assert not rows.is_outdated(plan, run)
    settings['clean']['options'] = {'model.width': 8}
    wider = plan_of(tmp_path, settings=settings, selection=None)
    assert wider.fingerprint(run) == plan.fingerprint(run)
    assert Rows(rows.file).is_outdated(wider, run)
    rows.add(run, plan.fingerprint(run), {})  # as rows were before they said what they started from
    assert not rows.is_outdated(wider, run)


# ---------------------------------------------------------------- equal measured time
def timed(folder: Path, seconds: dict[str, list[float]], **changes: Any) -> tuple[Plan, Rows]:
    """A study whose runs at equal epochs have cost so many seconds, by method and seed."""
    plan = plan_of(folder, budgets=['epochs', 'time'], selection=None, control='', **changes)
    rows = Rows(folder / 'rows.csv')
    for run in plan.report_runs('clean', dict.fromkeys(plan.study.methods)):
        if run.seed < len(seconds[run.method]):
            cost = {'digits/accuracy': 90.0 + run.seed, 'cost_seconds': seconds[run.method][run.seed]}
            rows.add(run, plan.fingerprint(run), cost)
    return plan, rows


def test_at_equal_time_epochs_are_divided_by_the_median_of_the_time_ratios(tmp_path: Path) -> None:
    # SAM's costs are 3, 2.4 and 2; by counting passes it is 2. Of the second seed everything was slow.
    seconds = {'base': [10.0, 20.0, 10.0], 'sam': [30.0, 48.0, 20.0], 'half': [15.0, 30.0, 15.0]}
    plan, rows = timed(tmp_path, seconds)
    chosen: dict[str, float | None] = dict.fromkeys(plan.study.methods)
    assert time_ratio(plan, rows, 'clean', 'sam', None) == pytest.approx(2.4)
    runs = timed_runs(plan, rows, 'clean', chosen)
    assert {run.method: run.epochs for run in runs} == {'base': 6, 'sam': round(6 / 2.4), 'half': 4}
    assert len(runs) == 3 * 3
    for run in [run for run in runs if run.id not in rows.by_id]:
        rows.add(run, plan.fingerprint(run), {'digits/accuracy': 80.0 + run.seed, 'cost_seconds': 1.0})
    found = {(entry.budget, entry.method): entry for entry in compare(plan, rows).comparisons}
    # The base optimizer's runs at equal time are those at equal epochs.
    assert found['epochs', 'base'].mean == found['time', 'base'].mean
    assert (found['time', 'sam'].epochs, found['time', 'sam'].compute) == (2, pytest.approx(2 * 2.4 / 6))
    assert found['time', 'half'].compute == pytest.approx(1.0)
    assert found['epochs', 'sam'].compute == 2.0
    assert found['epochs', 'sam'].time == pytest.approx(2.4)
    assert '| sam |  | 6 | 2.00 | 2.40 | 91.00' in markdown(plan.study, list(found.values()))
    assert 'equal measured time' in markdown(plan.study, list(found.values()))


def test_a_method_with_epochs_of_its_own_keeps_them_at_equal_time(tmp_path: Path) -> None:
    methods = {'base': {}, 'short': {'epochs': 4, 'options': {'train_dataloader.batch_size': 8}}}
    plan, rows = timed(tmp_path, {'base': [10.0] * 3, 'short': [9.0, 8.0, 7.0]}, methods=methods)
    chosen: dict[str, float | None] = dict.fromkeys(plan.study.methods)
    assert all(run.id in rows.by_id for run in timed_runs(plan, rows, 'clean', chosen))
    found = {(entry.budget, entry.method): entry for entry in compare(plan, rows).comparisons}
    assert (found['time', 'short'].epochs, found['time', 'short'].compute) == (4, pytest.approx(0.8))


def test_a_time_that_is_not_measured_yet_gives_no_runs_and_no_comparison(tmp_path: Path) -> None:
    plan, rows = timed(tmp_path, {'base': [10.0, 10.0, 10.0], 'sam': [20.0, 20.0], 'half': [10.0] * 3})
    runs = timed_runs(plan, rows, 'clean', dict.fromkeys(plan.study.methods))
    assert {run.method for run in runs} == {'base', 'half'}
    found = compare(plan, rows)
    assert ('time', 'sam') not in {(entry.budget, entry.method) for entry in found.comparisons}
    assert any('missing: sam_6e_seed2' in note for note in found.notes)


def test_rows_without_costs_are_named(tmp_path: Path) -> None:
    plan, rows = timed(tmp_path, {'base': [10.0] * 3, 'sam': [20.0] * 3, 'half': [10.0] * 3})
    run = Run('report', 'clean', 'sam', None, 6, 1)
    rows.add(run, plan.fingerprint(run), {'digits/accuracy': 90.0})
    with pytest.raises(UsageError, match='cost_seconds'):
        compare(plan, rows)


def test_a_setting_compares_its_own_methods_only(tmp_path: Path) -> None:
    settings = {'clean': SETTING, 'short': {**SETTING, 'methods': ['base', 'half']}}
    plan, rows = plan_of(tmp_path, settings=settings, selection=None), Rows(tmp_path / 'results.csv')
    runs = [run for name in settings for run in plan.report_runs(name, dict.fromkeys(plan.study.methods))]
    for run in runs:
        rows.add(run, plan.fingerprint(run), {plan.study.metric.name: 0.5})
    found = compare(plan, rows)
    assert found.notes == []
    assert {entry.method for entry in found.comparisons if entry.setting == 'short'} == {'base', 'half'}
    assert {entry.method for entry in found.comparisons if entry.setting == 'clean'} == {*plan.study.methods}
    assert 'unfinished' not in markdown(plan.study, found.comparisons)
