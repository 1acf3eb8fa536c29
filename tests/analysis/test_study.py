"""The study's parts: its file, its runs, corrupted annotations, statistics, the choice of rho, and the tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mm_sharp.analysis.study import Plan, Rows, Run, as_json, choose_rho, comparisons, markdown, only, plot, read_study
from mm_sharp.analysis.study.corruption import JITTER, corrupt_file
from mm_sharp.analysis.study.statistics import interval, paired
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.tiny_data import draw_coco

DIGITS = str(ROOT / 'configs/study/digits_cnn.py')


def small(**changes: Any) -> dict[str, Any]:
    """A study of three methods in one setting, as its YAML file has it."""
    return {
        'name': 'small',
        'metric': {'name': 'digits/accuracy'},
        'seeds': [0, 1, 2],
        'selection': {'seeds': [100, 101], 'rho': [0.05, 0.1]},
        'budgets': ['epochs', 'compute'],
        'control': 'half',
        'methods': {
            'base': {},
            'sam': {'type': 'SAMOptimWrapper'},
            'half': {'type': 'AUSAMOptimWrapper', 'sampling_ratio': 0.5, 's_min': 1.0},
        },
        'settings': {'clean': {'config': DIGITS, 'epochs': 6}},
        **changes,
    }


def write(folder: Path, content: Any) -> Path:
    file = folder / 'study.yaml'
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def plan_of(folder: Path, **changes: Any) -> Plan:
    return Plan(read_study(write(folder, small(**changes))), folder / 'out')


SETTING = {'config': DIGITS, 'epochs': 6}
WRONG: dict[str, tuple[Any, str]] = {
    'no mapping': ([1], 'the study is [1]: it must be a mapping'),
    'missing entry': ({'name': 'x'}, "the study needs an entry 'metric'"),
    'unknown entry': (small(seed=[1]), "the study has no entry 'seed'; did you mean 'seeds'?"),
    'metric entry': (small(metric={'nme': 'x'}), "metric has no entry 'nme'; did you mean 'name'?"),
    'better': (small(metric={'name': 'x', 'better': 'more'}), "metric.better: 'more' is not allowed"),
    'scale': (small(metric={'name': 'x', 'scale': 0}), 'metric.scale: 0 is not allowed'),
    'no base': (small(methods={'sam': {'type': 'SAMOptimWrapper'}}), 'methods.base: None is not allowed'),
    'a changed base': (small(methods={'base': {'type': 'SAMOptimWrapper'}}), 'methods.base: '),
    'no methods': (small(methods={}), 'methods: {} is not allowed'),
    'seeds': (small(seeds=[0, 0]), 'seeds: [0, 0] is not allowed: it must be a list of different integers'),
    'no seeds': (small(seeds=[]), 'seeds: [] is not allowed'),
    'a seed chosen and reported': (
        small(selection={'seeds': [2], 'rho': [0.1]}),
        'selection.seeds: [2] is not allowed: it must be other than seeds, which has [2], too',
    ),
    'rho': (small(selection={'seeds': [9], 'rho': [0.1, -1]}), 'selection.rho: [0.1, -1] is not allowed'),
    'budget': (small(budgets=['time']), "budgets: ['time'] is not allowed"),
    'control': (small(control='uniform'), "control: 'uniform' is not allowed: it must be one of base, sam, half"),
    'keep': (small(keep=['esam']), "keep: 'esam' is not allowed"),
    'config': (small(settings={'a': {**SETTING, 'config': 'no.py'}}), "settings.a.config: 'no.py' is not allowed"),
    'epochs': (small(settings={'a': {**SETTING, 'epochs': 0}}), 'settings.a.epochs: 0 is not allowed'),
    'corrupt': (small(settings={'a': {**SETTING, 'corrupt': 2}}), 'settings.a.corrupt: 2 is not allowed'),
    'load_from': (small(settings={'a': {**SETTING, 'load_from': 'b'}}), "settings.a.load_from: 'b' is not allowed"),
    'selects': (small(settings={'a': {**SETTING, 'selects': False}}), 'settings.a.selects: False is not allowed'),
    'a method that is a word': (
        small(methods={'base': {}, 'sam': 'SAM'}),
        "methods.sam: 'SAM' is not allowed: it must be changes of optim_wrapper, as {type: SAMOptimWrapper}",
    ),
    'a setting that is a word': (small(settings={'a': 'a.py'}), "settings.a: 'a.py' is not allowed: it must be a mapp"),
    'slash': (small(settings={'a/b': SETTING}), "settings.a/b: 'a/b' is not allowed: it must be a name without /"),
    'a chain': (
        small(settings={'a': {**SETTING, 'load_from': 'b'}, 'b': {**SETTING, 'load_from': 'a'}}),
        "settings.a.load_from: 'b' is not allowed: it must be a setting that starts from random weights itself",
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_study_is_refused_by_the_entry_that_is_wrong(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    with pytest.raises(UsageError) as error:
        read_study(write(tmp_path, content))
    assert message in str(error.value)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no study file'):
        read_study(tmp_path / 'none.yaml')
    (tmp_path / 'bad.yaml').write_text('a: [1')
    with pytest.raises(UsageError, match='is no YAML'):
        read_study(tmp_path / 'bad.yaml')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'methods': {'base': {}, 'half': {'type': 'AUSAMOptimWrapper', 's_min': -1}}}, 'methods.half in settings'),
        ({'methods': {'base': {}, 'half': {'type': 'NoWrapper'}}}, "'NoWrapper' is not registered"),
        ({'settings': {'clean': {**SETTING, 'options': {'model.width.x': 3}}}}, 'settings.clean.options do not fit'),
        ({'settings': {'clean': {**SETTING, 'options': {'val_dataloader': None}}}}, 'has no val_dataloader'),
        ({'settings': {'clean': {**SETTING, 'corrupt': 0.2}}}, 'has no ann_file to be corrupted'),
        ({'settings': {'clean': {**SETTING, 'options': {'train_cfg.max_epochs': None}}}}, 'does not train by epochs'),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_configs_is_refused_before_any_run(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    study = read_study(write(tmp_path, small(**{'control': '', **changes})))
    with pytest.raises(UsageError, match=message):
        Plan(study, tmp_path / 'out')


@pytest.mark.parametrize('file', sorted((ROOT / 'configs' / 'study').glob('*.yaml')), ids=lambda file: file.stem)
def test_every_study_of_the_project_can_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(file)
    assert study.control in study.methods
    control = {'sampling_ratio': 0.5, 's_min': 1.0, 's_max': 1.0}
    assert control.items() <= study.methods[study.control].items()


# ---------------------------------------------------------------- runs
def test_equal_compute_divides_the_epochs_by_the_cost_and_equal_runs_are_made_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert (plan.cost('clean', 'base'), plan.cost('clean', 'sam'), plan.cost('clean', 'half')) == (1, 2, 1)
    assert [plan.epochs('clean', name, 'compute') for name in ('base', 'sam', 'half')] == [6, 3, 6]
    runs = plan.report_runs('clean', {'base': None, 'sam': 0.1, 'half': 0.05})
    # Of six combinations of method and budget only SAM's two differ.
    assert len(runs) == 3 * 4
    assert len({run.id for run in runs}) == len(runs)
    assert {run.epochs for run in runs if run.method == 'sam'} == {6, 3}


def test_the_selection_tries_every_rho_and_the_base_once(tmp_path: Path) -> None:
    runs = plan_of(tmp_path).selection_runs('clean')
    assert [(run.method, run.rho, run.seed) for run in runs[:5]] == [
        ('base', None, 100), ('sam', 0.05, 100), ('sam', 0.1, 100), ('half', 0.05, 100), ('half', 0.1, 100),
    ]  # fmt: skip
    assert len(runs) == 10
    assert all(run.phase == 'select' for run in runs)


def test_a_method_with_a_rho_of_its_own_is_not_tuned(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, methods={'base': {}, 'sam': {'type': 'SAMOptimWrapper', 'rho': 0.3}}, control='')
    assert {run.method for run in plan.selection_runs('clean')} == {'base'}
    assert plan.config(Run('report', 'clean', 'sam', None, 6, 0)).optim_wrapper.rho == 0.3


def test_a_runs_config_is_the_settings_with_the_methods_wrapper_seed_and_schedule(tmp_path: Path) -> None:
    settings = {'clean': {**SETTING, 'options': {'train_dataloader.dataset.flipped': 0.2}}}
    plan = plan_of(tmp_path, settings=settings)
    select = plan.config(Run('select', 'clean', 'half', 0.1, 3, 101))
    report = plan.config(Run('report', 'clean', 'base', None, 6, 1))
    wrapper = select.optim_wrapper
    assert (wrapper.type, wrapper.rho, wrapper.s_min) == ('AUSAMOptimWrapper', 0.1, 1.0)
    assert wrapper.optimizer == report.optim_wrapper.optimizer
    assert report.optim_wrapper.type == 'OptimWrapper'
    assert select.train_dataloader.dataset.flipped == 0.2
    assert (select.randomness['seed'], report.randomness['seed']) == (101, 1)
    for cfg, epochs in ((select, 3), (report, 6)):
        assert (cfg.train_cfg.max_epochs, cfg.param_scheduler.T_max, cfg.param_scheduler.end) == (epochs,) * 3
    assert select.test_dataloader.dataset.split == 'select'
    assert report.test_dataloader.dataset.split == 'report'
    assert select.val_dataloader is None


def test_a_fingerprint_changes_with_the_config_and_not_with_the_folder(tmp_path: Path) -> None:
    clean = Run('report', 'clean', 'sam', 0.1, 6, 0)
    first = plan_of(tmp_path).fingerprint(clean)
    wider = {'clean': {**SETTING, 'options': {'model.width': 8}}}
    assert plan_of(tmp_path, settings=wider).fingerprint(clean) != first
    # Configs that name files in the study's folder: corrupted annotations, and weights to start from.
    data = str(draw_coco(tmp_path / 'data'))
    keypoints = {
        'config': str(ROOT / 'configs/study/simcc_res18-quarter_demo-64x48.py'),
        'epochs': 6,
        'options': {f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')},
    }
    settings = {
        'clean': keypoints,
        'corrupted': {**keypoints, 'corrupt': 0.2},
        'tuned': {**keypoints, 'load_from': 'clean'},
    }
    plan = plan_of(tmp_path, settings=settings)
    elsewhere = Plan(plan.study, tmp_path / 'elsewhere')
    runs = [Run('report', name, 'sam', 0.1, 6, 0) for name in settings]
    assert [elsewhere.fingerprint(run) for run in runs] == [plan.fingerprint(run) for run in runs]
    assert len({plan.fingerprint(run) for run in runs}) == 3


def test_a_setting_that_starts_from_another_takes_the_base_weights_of_its_own_phase_and_seed(tmp_path: Path) -> None:
    settings = {'clean': SETTING, 'tuned': {**SETTING, 'epochs': 2, 'load_from': 'clean'}}
    plan = plan_of(tmp_path, settings=settings)
    for phase, seed in (('select', 100), ('report', 2)):
        start = Run(phase, 'clean', 'base', None, 6, seed)
        cfg = plan.config(Run(phase, 'tuned', 'sam', 0.1, 2, seed))
        assert cfg.load_from == str(plan.weights(start))
        assert plan.keeps_weights(start)
    assert not plan.keeps_weights(Run('report', 'clean', 'sam', 0.1, 6, 0))
    assert set(only(plan.study, ['tuned']).settings) == {'clean', 'tuned'}
    assert set(only(plan.study, ['clean']).settings) == {'clean'}
    pooled = {'a': {**SETTING, 'pool': 'p'}, 'b': {**SETTING, 'pool': 'p'}, 'c': {**SETTING, 'load_from': 'a'}}
    assert set(only(plan_of(tmp_path, settings=pooled).study, ['c']).settings) == {'a', 'b', 'c'}
    with pytest.raises(UsageError, match='--settings'):
        only(plan.study, ['none'])


# ---------------------------------------------------------------- rows
def test_rows_are_there_again_after_a_file_was_cut_off(tmp_path: Path) -> None:
    file, runs = tmp_path / 'results.csv', plan_of(tmp_path).selection_runs('clean')
    rows = Rows(file)
    for number, run in enumerate(runs[:3]):
        rows.add(run, 'abc', {'digits/accuracy': 90.0 + number, 'steps': 60})
    text = file.read_text()
    file.write_text(text[: len(text) - 4])
    again = Rows(file)
    # Who only reads leaves the file alone: another process may be about to write the rest of the line.
    assert file.read_text() == text[: len(text) - 4]
    assert [again.has(run, 'abc') for run in runs[:4]] == [True, True, False, False]
    again.add(runs[2], 'abc', {'digits/accuracy': 50.0})
    assert Rows(file).value(runs[2], 'digits/accuracy') == 50.0
    assert Rows(file).value(runs[0], 'digits/accuracy') == 90.0


def test_a_row_of_another_config_is_outdated_until_it_is_replaced(tmp_path: Path) -> None:
    rows, run = Rows(tmp_path / 'results.csv'), Run('report', 'clean', 'sam', 0.1, 6, 0)
    rows.add(run, 'old', {'a': 1.0})
    assert rows.outdated(run, 'new')
    rows.add(run, 'new', {'b': 2.0})
    assert not rows.outdated(run, 'new')
    assert len(rows.file.read_text().splitlines()) == 2
    with pytest.raises(UsageError, match=r"'a' is not among what report/clean/sam_rho0\.1_6e_seed0 gave: b"):
        rows.value(run, 'a')


def test_a_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'results.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UsageError, match="is not a study's table of runs"):
        Rows(tmp_path / 'results.csv')


# ---------------------------------------------------------------- statistics, choice, tables
def test_intervals_are_students() -> None:
    # Table of t: 2.776 for 4 degrees of freedom; the standard deviation of 1 to 5 is sqrt(2.5).
    found = interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert interval([7]).half == math.inf
    assert [interval(v).sign for v in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.5], [4])] == [1, -1, 0, 0]
    assert paired([3, 5, 4], [1, 2, 3]) == interval([2, 3, 1])
    for wrong in ([], [1, math.nan], [math.inf]):
        with pytest.raises(ValueError, match='finite numbers'):
            interval(wrong)
    with pytest.raises(ValueError, match='do not make pairs'):
        paired([1, 2], [1])


def test_intervals_hold_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).normal(loc=2.0, size=(2000, 5))
    held = [abs(found.mean - 2.0) <= found.half for found in map(interval, draws)]
    assert 0.935 < np.mean(held) < 0.965


def filled(plan: Plan, value: Any) -> Rows:
    """Rows for all selection runs, and for the reported ones at rho 0.1, by a function of the run."""
    rows = Rows(plan.folder / 'results.csv')
    rho = {name: None if name == 'base' else 0.1 for name in plan.study.methods}
    for setting in plan.study.settings:
        for run in (*plan.selection_runs(setting), *plan.report_runs(setting, rho)):
            rows.add(run, 'x', {'digits/accuracy': value(run)})
    return rows


def test_rho_is_the_best_on_the_mean_of_its_pool_whatever_is_reported(tmp_path: Path) -> None:
    settings = {'a': {**SETTING, 'pool': 'p'}, 'b': {**SETTING, 'pool': 'p'}}
    good = {('a', 0.05): 90.0, ('a', 0.1): 91.0, ('b', 0.05): 80.0, ('b', 0.1): 70.0}

    def value(run: Run) -> float:
        return run.seed if run.phase == 'report' else good.get((run.setting, run.rho), 50.0) + run.seed % 2

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
    diverged = filled(tied, lambda run: math.nan if (run.rho, run.seed) == (0.05, 101) else 1.0)
    assert choose_rho(tied, diverged, ['clean'])['sam'] == 0.1


def test_comparisons_pair_the_seeds_and_scale(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, metric={'name': 'digits/accuracy', 'scale': 100.0})
    more = {('sam', 6): 0.02, ('sam', 3): -0.01, ('half', 6): 0.01}
    noise = {('sam', 0): 0.001, ('sam', 1): -0.001}

    def value(run: Run) -> float:
        return 0.5 + 0.1 * run.seed + more.get((run.method, run.epochs), 0) + noise.get((run.method, run.seed), 0)

    rows = filled(plan, value)
    found = comparisons(plan, rows, 'clean', {'base': None, 'sam': 0.1, 'half': 0.1})
    by = {(entry.method, entry.budget): entry for entry in found}
    assert len(found) == 6
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
    assert json.loads(as_json(plan.study, found))['comparisons'][1]['method'] == 'sam'
    plot(plan.study, found, tmp_path / 'plots' / 'differences.png')
    assert (tmp_path / 'plots' / 'differences.png').read_bytes().startswith(b'\x89PNG')


def test_a_reported_run_that_diverged_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    rows = filled(plan, lambda run: math.nan if run.method == 'sam' else 1.0)
    with pytest.raises(UsageError, match=r'sam_rho0\.1_6e_seed0 has diverged'):
        comparisons(plan, rows, 'clean', {'base': None, 'sam': 0.1, 'half': 0.1})


# ---------------------------------------------------------------- corrupted annotations
def test_spoilt_people_are_exactly_as_many_half_moved_and_half_mirrored(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / 'data', train=60)
    source = folder / 'annotations/person_keypoints_train.json'
    content = json.loads(source.read_text())
    names = ['nose', *(f'{side}_{part}' for part in 'abcdefgh' for side in ('left', 'right'))]
    content['categories'][0]['keypoints'] = names
    for person in content['annotations']:
        person['keypoints'][3 * 16 : 3 * 17] = [0, 0, 0]  # not labelled
    source.write_text(json.dumps(content))
    corrupted = corrupt_file(source, tmp_path / 'new' / 'corrupted.json', 0.2, seed=3)
    after = json.loads((tmp_path / 'new' / 'corrupted.json').read_text())
    assert len(corrupted) == len(set(corrupted)) == 12
    assert corrupt_file(source, tmp_path / 'again.json', 0.2, seed=3) == corrupted
    assert (tmp_path / 'again.json').read_bytes() == (tmp_path / 'new' / 'corrupted.json').read_bytes()
    assert corrupt_file(source, tmp_path / 'other.json', 0.2, seed=4) != corrupted
    mirror, moved = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))], 0
    for old, new in zip(content['annotations'], after['annotations'], strict=True):
        was, now = (np.reshape(person['keypoints'], (17, 3)) for person in (old, new))
        assert {k: v for k, v in old.items() if k != 'keypoints'} == {k: v for k, v in new.items() if k != 'keypoints'}
        if old['id'] not in corrupted:
            assert np.array_equal(was, now)
        elif not np.array_equal(now, was[mirror]):
            moved += 1
            assert np.array_equal(now[16], was[16])
            errors = (now - was)[:16, :2] / math.sqrt(old['bbox'][2] * old['bbox'][3])
            assert 0.5 * JITTER < errors.std() < 1.6 * JITTER
    assert moved == 6


def test_annotations_that_cannot_be_spoilt_are_refused(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / 'data')
    source = folder / 'annotations/person_keypoints_train.json'
    with pytest.raises(UsageError, match='do not name their keypoints'):
        corrupt_file(source, tmp_path / 'out.json', 1.0)
    (tmp_path / 'empty.json').write_text('{"annotations": []}')
    with pytest.raises(UsageError, match='no annotated keypoints'):
        corrupt_file(tmp_path / 'empty.json', tmp_path / 'out.json', 0.5)
