"""A study's file, its runs and their configs, and corrupted annotations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_sharp.analysis.study import Plan, Rows, Run, choose_rho, only, read_study
from mm_sharp.analysis.study.corruption import JITTER, corrupt_file
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.studies import SETTING, plan_of, small, write
from tests.tiny_data import draw_coco

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
    'own_rho': (
        small(selection={'seeds': [9], 'rho': [0.1], 'own_rho': {'sam': []}}),
        'selection.own_rho.sam: [] is not allowed: it must be a list of numbers above 0',
    ),
    'own_rho of no method': (
        small(selection={'seeds': [9], 'rho': [0.1], 'own_rho': {'esam': [0.1]}}),
        "selection.own_rho: 'esam' is not allowed: it must be one of base, sam, half",
    ),
    'own_rho of the base': (
        small(selection={'seeds': [9], 'rho': [0.1], 'own_rho': {'base': [0.1]}}),
        'selection.own_rho.base: [0.1] is not allowed: it must be of a method whose rho is to be chosen',
    ),
    'options of a method': (
        small(methods={'base': {}, 'half': {'options': 16}}),
        'methods.half.options: 16 is not allowed: it must be a mapping of dotted keys',
    ),
    'epochs of a method': (
        small(methods={'base': {}, 'long': {'epochs': 0}}, control=''),
        'methods.long.epochs: 0 is not allowed: it must be an integer of at least 1',
    ),
    'budget': (small(budgets=['money']), "budgets: ['money'] is not allowed"),
    'time alone': (small(budgets=['time']), "budgets: ['time'] is not allowed: it must be with epochs, too"),
    'control': (small(control='uniform'), "control: 'uniform' is not allowed: it must be one of base, sam, half"),
    'keep': (small(keep=['esam']), "keep: 'esam' is not allowed"),
    'a word for a list': (small(keep='sam'), "keep: 'sam' is not allowed: it must be a list"),
    'a list for a word': (small(control=['sam']), "control: ['sam'] is not allowed: it must be a text"),
    'a list in a list': (small(keep=[['sam']]), "keep: ['sam'] is not allowed: it must be one of base, sam, half"),
    'a number for a label': (
        small(labels={'sam': 0.02}),
        "labels: {'sam': 0.02} is not allowed: it must be a mapping to",
    ),
    'labels': (small(labels={'esam': 'ESAM'}), "labels: 'esam' is not allowed: it must be one of base, sam, half"),
    'no config': (small(settings={'a': {**SETTING, 'config': None}}), 'settings.a.config: None is not allowed'),
    'config': (small(settings={'a': {**SETTING, 'config': 'no.py'}}), "settings.a.config: 'no.py' is not allowed"),
    'epochs': (small(settings={'a': {**SETTING, 'epochs': 0}}), 'settings.a.epochs: 0 is not allowed'),
    'corrupt': (small(settings={'a': {**SETTING, 'corrupt': 2}}), 'settings.a.corrupt: 2 is not allowed'),
    'load_from': (small(settings={'a': {**SETTING, 'load_from': 'b'}}), "settings.a.load_from: 'b' is not allowed"),
    'a word for true': (small(settings={'a': {**SETTING, 'selects': 'x'}}), "settings.a.selects: 'x' is not allowed"),
    'selects': (small(settings={'a': {**SETTING, 'selects': False}}), 'settings.a.selects: False is not allowed'),
    'a method that is a word': (
        small(methods={'base': {}, 'sam': 'SAM'}),
        "methods.sam: 'SAM' is not allowed: it must be changes of optim_wrapper, as {type: SAMOptimWrapper}",
    ),
    'a setting that is a word': (small(settings={'a': 'a.py'}), "settings.a: 'a.py' is not allowed: it must be a mapp"),
    'slash': (small(settings={'a/b': SETTING}), "settings.a/b: 'a/b' is not allowed: it must be a name without /"),
    'own weights of nothing': (
        small(settings={'a': {**SETTING, 'load_own': True}}),
        'settings.a.load_own: True is not allowed: it must be false without load_from',
    ),
    'own weights of a rho': (
        small(settings={'a': {**SETTING, 'load_from': 'b', 'load_own': True}, 'b': SETTING}),
        'settings.a.load_own: True is not allowed: it must be false where rho is chosen',
    ),
    'methods of a setting': (
        small(settings={'a': {**SETTING, 'methods': ['sam']}}),
        "settings.a.methods: ['sam'] is not allowed: it must be with 'base'",
    ),
    'unknown methods of a setting': (
        small(settings={'a': {**SETTING, 'methods': ['base', 'adam']}}),
        "settings.a.methods: 'adam' is not allowed: it must be one of base",
    ),
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
    with pytest.raises(UsageError, match=r"no study file .*: did you mean 'bad.yaml'\?"):
        read_study(tmp_path / 'bat.yaml')
    (tmp_path / 'config.py').write_text('model = dict()')
    with pytest.raises(UsageError, match='is a config: a study is a YAML file'):
        read_study(tmp_path / 'config.py')
    with pytest.raises(UsageError, match='is no YAML'):
        read_study(tmp_path / 'bad.yaml')
    (tmp_path / 'twice.yaml').write_text('methods:\n  base: {}\n  half: {type: A}\n  half: {type: B}\n')
    with pytest.raises(UsageError, match="'half' is written twice in one mapping, from line 2 on"):
        read_study(tmp_path / 'twice.yaml')
    (tmp_path / 'picture.yaml').write_bytes(b'\xff\xd8')
    with pytest.raises(UsageError, match='is no YAML'):
        read_study(tmp_path / 'picture.yaml')
    (tmp_path / 'odd.yaml').write_text('? [1, 2]\n: 3\n')
    with pytest.raises(UsageError, match='is no YAML'):
        read_study(tmp_path / 'odd.yaml')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'methods': {'base': {}, 'half': {'type': 'AUSAMOptimWrapper', 's_min': -1}}}, 'methods.half in settings'),
        ({'methods': {'base': {}, 'half': {'type': 'NoWrapper'}}}, "'NoWrapper' is not registered"),
        ({'settings': {'clean': {**SETTING, 'options': {'model.width.x': 3}}}}, 'settings.clean.options do not fit'),
        ({'methods': {'base': {}, 'b': {'options': {'model.width.x': 3}}}}, r'methods\.b\.options do not fit'),
        ({'settings': {'clean': {**SETTING, 'options': {'val_dataloader': None}}}}, 'has no val_dataloader'),
        ({'settings': {'clean': {**SETTING, 'options': {'train_dataloader.batch_size': 'x'}}}}, "batch_size='x' is"),
        ({'settings': {'clean': {**SETTING, 'options': {3: 1}}}}, r"clean\.options 3=…: the config has no '3'"),
        (
            {'settings': {'clean': {**SETTING, 'options': {'trian_cfg.max_epochs': 3}}}},
            r"settings\.clean\.options trian_cfg\.max_epochs=…: the config has no 'trian_cfg'; did you mean",
        ),
        ({'methods': {'base': {}, 'b': {'options': {'modle.width': 3}}}}, r"methods\.b\.options modle\.width=…"),
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
    assert study.control in ('', *study.methods)
    if study.control == 'uniform':  # by either way to say so
        control, bounds = study.methods['uniform'], {'s_min': 1.0, 's_max': 1.0}
        assert control['sampling_ratio'] == 0.5
        assert control.get('draw') == 'uniform' or bounds.items() <= control.items()
    # The scale of the fragments, unless a method's label says another.
    scale = {'rho': 0.02, 'adaptive': 'tensor', 'perturb': 'weights'}
    assert all(
        own.items() >= scale.items() or f'rho {own["rho"]}' in study.labels.get(name, '')
        for name, own in study.methods.items()
        if own.get('adaptive') == 'tensor' and 'rho' in own
    )


# ---------------------------------------------------------------- runs
def test_equal_compute_divides_the_epochs_by_the_cost_and_equal_runs_are_made_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [plan._costs['clean', name].cycle for name in ('base', 'sam', 'half')] == [1, 2, 1]
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


_COSINE = {'type': 'CosineAnnealingLR', 'eta_min': 0.0}


@pytest.mark.parametrize(
    ('schedulers', 'epochs', 'expected'),
    [
        # RTMPose's: constant, and a cosine over the second half.
        ([{**_COSINE, 'begin': 4, 'end': 8, 'T_max': 4}], 4, [{'begin': 2, 'end': 4, 'T_max': 2}]),
        ([{**_COSINE, 'begin': 4, 'end': 8, 'T_max': 4}], 16, [{'begin': 8, 'end': 16, 'T_max': 8}]),
        ([{**_COSINE, 'begin': 7, 'end': 8, 'T_max': 1}], 2, [{'begin': 1, 'end': 2, 'T_max': 1}]),
        # A warm-up by epochs stays as long as it is.
        (
            [{'type': 'LinearLR', 'end': 1, 'start_factor': 0.1}, {**_COSINE, 'begin': 1, 'end': 8, 'T_max': 7}],
            4,
            [{'end': 1}, {'begin': 1, 'end': 4, 'T_max': 3}],
        ),
        # MMPose's heatmap recipes: steps down.
        ([{'type': 'MultiStepLR', 'milestones': [6, 7], 'end': 8}], 4, [{'milestones': [3, 4], 'end': 4}]),
        ([{'type': 'MultiStepLR', 'milestones': [4]}], 4, [{'milestones': [2]}]),
        # By iterations, and one that ends before.
        ([{**_COSINE, 'by_epoch': False, 'end': 8, 'T_max': 8}], 4, [{'end': 8, 'T_max': 8}]),
        ([{**_COSINE, 'begin': 2, 'end': 6, 'T_max': 4}], 4, [{'begin': 2, 'end': 6, 'T_max': 4}]),
    ],
)
def test_schedulers_that_end_with_the_training_are_stretched_as_a_whole(
    tmp_path: Path, schedulers: list[dict[str, Any]], epochs: int, expected: list[dict[str, Any]]
) -> None:
    options = {'param_scheduler': schedulers, 'train_cfg.max_epochs': 8}
    plan = plan_of(tmp_path, settings={'clean': {**SETTING, 'options': options}})
    found = plan.config(Run('report', 'clean', 'base', None, epochs, 1)).param_scheduler
    for scheduler, before, changed in zip(found, schedulers, expected, strict=True):
        assert dict(scheduler) == {**before, **changed}


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


def test_a_setting_can_train_on_each_methods_own_weights(tmp_path: Path) -> None:
    settings = {'clean': SETTING, 'tuned': {**SETTING, 'epochs': 2, 'load_from': 'clean', 'load_own': True}}
    plan = plan_of(tmp_path, settings=settings, selection=None, budgets=['epochs', 'compute'])
    # SAM has half of the base optimizer's six epochs at equal compute.
    for method, epochs in (('base', 6), ('sam', 3)):
        start = Run('report', 'clean', method, None, epochs, 1)
        assert plan.epochs('tuned', method, 'compute') == 2
        cfg = plan.config(Run('report', 'tuned', method, None, 2, 1))
        assert cfg.load_from == str(plan.weights(start))
        assert cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper'
        assert plan.keeps_weights(start)
    assert not plan.keeps_weights(Run('report', 'clean', 'sam', None, 6, 1))


def test_own_weights_are_trained_on_by_the_settings_config_alike(tmp_path: Path) -> None:
    settings = {'clean': SETTING, 'tuned': {**SETTING, 'epochs': 2, 'load_from': 'clean', 'load_own': True}}
    own = {'epochs': 4, 'options': {'train_dataloader.batch_size': 8}}
    methods = {'base': {}, 'short': own, 'sam': {'type': 'SAMOptimWrapper', **own}}
    plan = plan_of(tmp_path, settings=settings, methods=methods, selection=None, control='')
    same = {'train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'}
    base = plan.config(Run('report', 'tuned', 'base', None, 2, 1)).to_dict()
    for method in ('short', 'sam'):
        assert plan.epochs('clean', method, 'epochs') == 4
        assert plan.epochs('tuned', method, 'epochs') == 2
        cfg = plan.config(Run('report', 'tuned', method, None, 2, 1)).to_dict()
        assert {name: cfg[name] for name in same} == {name: base[name] for name in same}
        assert cfg['load_from'] == str(plan.weights(Run('report', 'clean', method, None, 4, 1)))


# ---------------------------------------------------------------- corrupted annotations
def test_corrupted_people_are_exactly_as_many_half_moved_and_half_mirrored(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / 'data', train=60)
    source = folder / 'annotations/person_keypoints_train.json'
    content = json.loads(source.read_text())
    names = ['nose', *(f'{side}_{part}' for part in 'abcdefgh' for side in ('left', 'right'))]
    content['categories'][0]['keypoints'] = names
    for person in content['annotations']:
        person['keypoints'][3 * 16 : 3 * 17] = [0, 0, 0]  # not labelled
    source.write_text(json.dumps(content))
    target, again, other = (tmp_path / 'new' / f'{name}.json' for name in ('corrupted', 'again', 'other'))
    for file, seed in ((target, 3), (again, 3), (other, 4)):
        corrupt_file(source, file, 0.2, seed)
    assert target.read_bytes() == again.read_bytes() != other.read_bytes()
    after = json.loads(target.read_text())
    mirror = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]
    mirrored = moved = 0
    for old, new in zip(content['annotations'], after['annotations'], strict=True):
        was, now = (np.reshape(person['keypoints'], (17, 3)) for person in (old, new))
        assert {k: v for k, v in old.items() if k != 'keypoints'} == {k: v for k, v in new.items() if k != 'keypoints'}
        if np.array_equal(now, was[mirror]):
            mirrored += 1
        elif not np.array_equal(was, now):
            moved += 1
            assert np.array_equal(now[16], was[16])
            errors = (now - was)[:16, :2] / math.sqrt(old['bbox'][2] * old['bbox'][3])
            assert 0.5 * JITTER < errors.std() < 1.6 * JITTER
    assert (mirrored, moved) == (6, 6)


def test_annotations_that_cannot_be_corrupted_are_refused(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / 'data')
    source = folder / 'annotations/person_keypoints_train.json'
    with pytest.raises(
        UsageError, match=r"person_keypoints_train\.json': the annotations name no keypoints, so left and"
    ):
        corrupt_file(source, tmp_path / 'out.json', 1.0)
    content = json.loads(source.read_text())
    content['categories'][0]['keypoints'] = [f'thumb{number}' for number in range(17)]
    (tmp_path / 'hand.json').write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match=r'call none of their keypoints left_… and right_… \(thumb0, thumb1, .*, so left'
    ):
        corrupt_file(tmp_path / 'hand.json', tmp_path / 'out.json', 1.0)
    assert not (tmp_path / 'out.json').exists()
    (tmp_path / 'empty.json').write_text('{"annotations": []}')
    with pytest.raises(UsageError, match='no annotated keypoints'):
        corrupt_file(tmp_path / 'empty.json', tmp_path / 'out.json', 0.5)


def test_corrupted_files_of_one_name_are_refused(tmp_path: Path) -> None:
    config, settings = ROOT / 'configs/study/simcc_res18-quarter_demo-64x48.py', {}
    for name in ('one', 'other'):
        folder = draw_coco(tmp_path / name)
        options = {'train_dataloader.dataset.data_root': str(folder)}
        settings[name] = {'config': str(config), 'epochs': 2, 'options': options, 'corrupt': 0.2}
    metric = {'name': 'coco/AP'}
    with pytest.raises(
        UsageError, match=r'settings\.one\.corrupt: .*/one/.* and .*/other/.* of settings\.other would have'
    ):
        plan_of(tmp_path, settings=settings, metric=metric)
    settings['other']['corrupt'] = 0.1
    plan = plan_of(tmp_path, settings=settings, metric=metric)
    assert len({plan.corrupted(setting) for setting in plan.study.settings.values()}) == 2


# ---------------------------------------------------------------- methods with settings of their own
METHODS: dict[str, Any] = {
    'base': {},
    'base-16': {'options': {'train_dataloader.batch_size': 16}},
    'sam': {'type': 'SAMOptimWrapper'},
    'half-16': {'type': 'AUSAMOptimWrapper', 'sampling_ratio': 0.5, 'options': {'train_dataloader.batch_size': 16}},
}


def test_a_method_may_change_the_whole_config(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, methods=METHODS, control='')
    sizes = {}
    for method in METHODS:
        cfg = plan.config(Run('report', 'clean', method, None, 6, 0))
        sizes[method] = cfg.train_dataloader.batch_size
        assert 'options' not in cfg.optim_wrapper
        assert cfg.optim_wrapper.type == METHODS[method].get('type', 'OptimWrapper')
    assert sizes == {'base': 40, 'base-16': 16, 'sam': 40, 'half-16': 16}
    # A competitor without a rho is not tuned, and costs what the base optimizer costs.
    assert plan._costs['clean', 'base-16'].cycle == 1
    assert {run.method for run in plan.selection_runs('clean')} == {'base', 'sam', 'half-16'}


def test_a_method_may_have_epochs_of_its_own_at_every_budget(tmp_path: Path) -> None:
    methods = {'base': {}, 'base-2e': {'epochs': 2}, 'sam-2e': {'type': 'SAMOptimWrapper', 'rho': 0.1, 'epochs': 2}}
    plan = plan_of(tmp_path, methods=methods, control='', selection=None)
    for budget in ('epochs', 'compute'):
        assert [plan.epochs('clean', name, budget) for name in methods] == [6, 2, 2]
    runs = plan.report_runs('clean', dict.fromkeys(methods))
    assert {(run.method, run.epochs) for run in runs} == {('base', 6), ('base-2e', 2), ('sam-2e', 2)}
    assert plan.compute('clean', 'base-2e', 2) == pytest.approx(1 / 3)
    cfg = plan.config(Run('report', 'clean', 'base-2e', None, 2, 0))
    assert cfg.train_cfg.max_epochs == 2
    assert 'epochs' not in cfg.optim_wrapper


def test_a_method_may_have_candidates_of_its_own(tmp_path: Path) -> None:
    selection = {'seeds': [100], 'rho': [0.05, 0.1], 'own_rho': {'half': [0.5, 1.0, 2.0]}}
    plan = plan_of(tmp_path, selection=selection)
    runs = plan.selection_runs('clean')
    assert [run.rho for run in runs if run.method == 'sam'] == [0.05, 0.1]
    assert [run.rho for run in runs if run.method == 'half'] == [0.5, 1.0, 2.0]
    rows = Rows(tmp_path / 'rows.csv')
    best = {'sam': 0.1, 'half': 2.0}
    for run in runs:
        rows.add(run, plan.fingerprint(run), {'digits/accuracy': float(run.rho == best.get(run.method))})
    assert choose_rho(plan, rows, ['clean']) == {'base': None, **best}
