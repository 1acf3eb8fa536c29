"""Fragments take effect when a config is read, wherever it is read, and leave every other config as it is."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner

from mm_sharp import SAMOptimWrapper, SharpnessHook
from mm_sharp.analysis.benchmark.candidates import parse_methods, wrapper_settings
from mm_sharp.cli import options as cli
from mm_sharp.config import fragments
from mm_sharp.config.fragments import apply_fragments, as_written
from mm_sharp.config.preflight import check_wrappers
from mm_sharp.errors import RECOMMENDED, UsageError
from mm_sharp.per_sample_loss.find import PerSampleLossError
from tests.conftest import ROOT
from tests.toys import toy_config

FRAGMENTS = ROOT / 'configs' / '_base_'
BODY = 'mmpose::body_2d_keypoint/'
RECIPES = {
    'simcc': BODY + 'simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py',
    'rtmpose': BODY + 'rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py',
    'heatmap': BODY + 'topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py',
}
# Lines for networks that are built in no time.
RESNET = """model = dict(
    backbone=dict(depth=18, stem_channels=8, base_channels=8),
    head=dict(in_channels=64, deconv_out_channels=(8, 8, 8)),
)"""
NARROW = {
    'simcc': RESNET,
    'rtmpose': 'model = dict(backbone=dict(widen_factor=0.125), head=dict(in_channels=128))',
    'heatmap': RESNET,
}
METHODS = ('sam', 'esam', 'ausam')
EXPLICIT = (
    'optim_wrapper = _base_.sharp_optim_wrapper',
    'custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]',
)
SHARP = {'type': 'SAMOptimWrapper', 'rho': 0.1}
SGD = {'type': 'SGD', 'lr': 0.1, 'weight_decay': 1e-4}
SETTINGS = 'dict(policy=dict(weight_bit_width=4, act_bit_width=4), calibration=dict(num_batches=2))'
QUANTIZATION = f'sharp_quantization = {SETTINGS}'
POLICY = {'weight_bit_width': 4, 'act_bit_width': 4}


@pytest.fixture
def quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformation of a config needs nothing of the module that it has imported."""
    monkeypatch.setitem(sys.modules, 'mm_sharp.quantization', ModuleType('mm_sharp.quantization'))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that reading a config writes to the log."""
    lines: list[str] = []
    monkeypatch.setattr(fragments, 'print_log', lambda line, *_: lines.append(line))
    return lines


def write(folder: Path, bases: list[str], *lines: str) -> Path:
    """A user's config; the base 'w4a4' is a quantization fragment beside it."""
    (folder / 'w4a4.py').write_text(QUANTIZATION)
    file = folder / 'user.py'
    names = [{'w4a4': str(folder / 'w4a4.py')}.get(base, base) for base in bases]
    file.write_text('\n'.join([f'_base_ = {names}', *lines]))
    return file


def fragment(method: str) -> str:
    return f'mm_sharp::_base_/{method}.py'


def load(file: Path, **options: Any) -> Config:
    """The config that our tools end up with."""
    args = argparse.Namespace(config=str(file), cfg_options=options, work_dir=None, launcher='none', local_rank=0)
    return cli.load_config(args)


def applied(**config: Any) -> Config:
    cfg = Config(config)
    apply_fragments(cfg)
    return cfg


def wrapper_of(existing: Any, sharp: Any = SHARP) -> Any:
    """What becomes of an ``optim_wrapper`` beside a fragment."""
    return applied(sharp_optim_wrapper=deepcopy(sharp), optim_wrapper=existing).to_dict()['optim_wrapper']


# -------------------------------------------------------------------- sharp_optim_wrapper
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('method', METHODS)
def test_a_fragment_alone_is_as_good_as_the_lines(tmp_path: Path, recipe: str, method: str) -> None:
    bases = [RECIPES[recipe], fragment(method)]
    alone = Config.fromfile(write(tmp_path, bases))
    lines = Config.fromfile(write(tmp_path, bases, *EXPLICIT))
    assert alone.to_dict() == lines.to_dict()
    assert alone.optim_wrapper.type == f'{method.upper()}OptimWrapper'
    assert alone.custom_hooks[-1] == {'type': 'SharpnessHook'}
    check_wrappers(alone)


@pytest.mark.parametrize('recipe', RECIPES)
def test_twice_is_once_and_so_is_written_and_read_again(tmp_path: Path, recipe: str, quantization: None) -> None:
    cfg = Config.fromfile(write(tmp_path, [RECIPES[recipe], 'w4a4', fragment('ausam')]))
    once = deepcopy(cfg.to_dict())
    apply_fragments(cfg)
    assert cfg.to_dict() == once
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == once


values = st.one_of(st.floats(0, 1), st.booleans(), st.none(), st.dictionaries(st.sampled_from('ab'), st.integers()))
keys = st.sampled_from(['rho', 'clip_grad', 'accumulative_counts', 'perturb', 'paramwise_cfg', 'dtype', 'own'])


@given(sharp=st.dictionaries(keys, values), existing=st.dictionaries(keys, values))
def test_what_the_recipe_and_the_user_set_wins(sharp: dict[str, Any], existing: dict[str, Any]) -> None:
    sharp['type'] = 'ESAMOptimWrapper'
    existing.update(type='OptimWrapper', optimizer={'type': 'SGD'})
    cfg = Config({'sharp_optim_wrapper': sharp, 'optim_wrapper': existing, 'other': existing})
    before = deepcopy(cfg.to_dict())
    apply_fragments(cfg)
    assert cfg.to_dict() == {**before, 'optim_wrapper': {**sharp, **existing, 'type': 'ESAMOptimWrapper'}}
    apply_fragments(cfg)
    cfg.optim_wrapper.rho = 'changed'
    assert cfg.sharp_optim_wrapper.to_dict() == before['sharp_optim_wrapper']
    assert cfg.other.to_dict() == before['other']


def test_messages_recommend_the_fragments_scale() -> None:
    fragment = Config.fromfile(FRAGMENTS / 'sam.py').sharp_optim_wrapper
    assert ', '.join(f'{key}={value!r}' for key, value in fragment.items() if key != 'type') == RECOMMENDED
    assert RECOMMENDED in str(PerSampleLossError('A loss.'))
    with pytest.raises(UsageError, match=re.escape(RECOMMENDED)):
        check_wrappers(Config({'optim_wrapper': None}))


def test_the_fragments_own_values_are_not_shared() -> None:
    cfg = applied(sharp_optim_wrapper={**SHARP, 'perturb': {'norm': False}}, optim_wrapper={'optimizer': SGD})
    cfg.optim_wrapper.perturb.norm = True
    assert cfg.sharp_optim_wrapper.perturb.norm is False


@pytest.mark.parametrize(
    ('existing', 'sharp', 'dtype'),
    [
        ({}, {}, 'float16'),
        ({'dtype': None}, {}, 'float16'),
        ({'dtype': 'bfloat16'}, {}, 'bfloat16'),
        ({'use_fsdp': True, 'loss_scale': 512.0}, {}, 'float16'),
        ({}, {'dtype': 'bfloat16'}, 'bfloat16'),
        ({'dtype': 'float16'}, {'dtype': 'bfloat16'}, 'float16'),
    ],
)
@pytest.mark.parametrize('kind', ['AmpOptimWrapper', 'mmengine.AmpOptimWrapper', AmpOptimWrapper])
def test_mixed_precision_is_taken_over(
    existing: dict[str, Any], sharp: dict[str, Any], dtype: str, kind: str | type
) -> None:
    found = wrapper_of({'type': kind, 'optimizer': SGD, **existing}, {**SHARP, **sharp})
    scale = {key: value for key, value in existing.items() if key == 'loss_scale'}
    assert found == {**SHARP, 'optimizer': SGD, 'dtype': dtype, **scale}
    check_wrappers(Config({'optim_wrapper': found}))


def test_a_fragment_without_a_type_is_refused() -> None:
    with pytest.raises(ValueError, match="sharp_optim_wrapper = dict\\(type='SAMOptimWrapper'"):
        wrapper_of({'optimizer': SGD}, {'rho': 0.1})


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OnesOwn:
    """Builds several optimizer wrappers."""


class OptimWrapperOfOnesOwn(OptimWrapper):  # type: ignore[misc]
    """Made by another package."""


LEFT_ALONE: dict[str, Any] = {
    'ours': {'type': 'AUSAMOptimWrapper', 'rho': 0.3, 'optimizer': SGD},
    'our class': {'type': SAMOptimWrapper, 'optimizer': SGD},
    "another package's": {'type': OptimWrapperOfOnesOwn, 'optimizer': SGD},
    'by its name': {'type': 'theirs.OptimWrapper', 'optimizer': SGD},
    "MMEngine's for others": {'type': 'ApexOptimWrapper', 'optimizer': SGD},
    'several': {'constructor': 'OnesOwn', 'generator': {'optimizer': SGD}, 'critic': {'optimizer': SGD}},
    'no optimizer': {'rho': 0.3},
    'None': None,
}


@pytest.mark.parametrize('case', LEFT_ALONE)
def test_what_is_left_alone(case: str) -> None:
    cfg = Config({'sharp_optim_wrapper': SHARP, 'sharp_hook': {'type': 'SharpnessHook'}})
    cfg.optim_wrapper = deepcopy(LEFT_ALONE[case])
    before = deepcopy(cfg._cfg_dict)
    apply_fragments(cfg)
    assert cfg._cfg_dict == before
    assert fragments.pending_fragments(cfg) == set()


@pytest.mark.parametrize(
    ('case', 'advice'),
    [
        ("another package's", 'OptimWrapperOfOnesOwn: add the line `optim_wrapper = _base_.sharp_optim_wrapper`'),
        ('several', r"OptimWrapper, OptimWrapper: add .* type, as NAME=dict\(type='SAMOptimWrapper'"),
    ],
)
def test_what_cannot_take_effect_is_refused_before_training(case: str, advice: str) -> None:
    with pytest.raises(UsageError, match=f'trains without it, since its optim_wrapper is {advice}'):
        check_wrappers(applied(sharp_optim_wrapper=SHARP, optim_wrapper=LEFT_ALONE[case]))


def test_a_fragment_read_on_its_own_stays_what_it_is(quantization: None, tmp_path: Path) -> None:
    write(tmp_path, [])
    for file in (*FRAGMENTS.rglob('*.py'), tmp_path / 'w4a4.py'):
        with as_written():
            written = Config.fromfile(file)
        assert Config.fromfile(file).to_dict() == written.to_dict()


@pytest.mark.parametrize('key', ['sharp_optim_wrapper', 'sharp_quantization'])
def test_none_switches_a_fragment_off(tmp_path: Path, key: str, quantization: None) -> None:
    file = write(tmp_path, [RECIPES['simcc'], 'w4a4', fragment('sam')], f'{key} = None')
    cfg = Config.fromfile(file)
    assert ('type' in cfg.optim_wrapper) == (key != 'sharp_optim_wrapper')
    assert (cfg.model.type == 'QuantizedModel') == (key != 'sharp_quantization')
    types = [hook.type for hook in cfg.custom_hooks]
    assert types == ['SyncBuffersHook', 'CalibrationHook' if key == 'sharp_optim_wrapper' else 'SharpnessHook']


# -------------------------------------------------------------------- hooks
@pytest.mark.parametrize(
    ('hooks', 'added'),
    [
        (None, True),
        ([], True),
        ([{'type': 'EMAHook'}, Hook()], True),
        ([{'type': 'SharpnessHook', 'interval': 5}], False),
        ([{'type': 'mm_sharp.SharpnessHook'}], False),
        (({'type': SharpnessHook},), False),
        ([SharpnessHook(3)], False),
    ],
)
def test_the_hook_comes_once(hooks: Any, added: bool) -> None:
    cfg = Config({'sharp_optim_wrapper': SHARP, 'optim_wrapper': {'optimizer': SGD}})
    cfg.sharp_hook, cfg.custom_hooks = {'type': 'SharpnessHook'}, hooks
    apply_fragments(cfg)
    assert len(cfg.custom_hooks) == len(hooks or []) + added
    assert cfg.optim_wrapper.type == 'SAMOptimWrapper'


def test_a_hook_that_is_switched_off_does_not_come() -> None:
    cfg = applied(sharp_optim_wrapper=SHARP, sharp_hook=None, optim_wrapper={'optimizer': SGD}, custom_hooks=[])
    assert cfg.custom_hooks == []


# -------------------------------------------------------------------- where configs are read
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_config_without_our_keys_is_untouched(tmp_path: Path, recipe: str) -> None:
    file = write(tmp_path, [RECIPES[recipe]], 'quantization = dict(bits=4)  # of another project')
    with as_written():
        cfg = Config.fromfile(file)
    members = dict(cfg._cfg_dict)
    before = deepcopy(cfg.to_dict())
    apply_fragments(cfg)
    assert all(cfg[key] is value for key, value in members.items())
    assert cfg.to_dict() == before == Config.fromfile(file).to_dict()
    assert cfg.pretty_text == Config.fromfile(file).pretty_text


def test_installed_once() -> None:
    construct = Config.__init__
    fragments.install()
    assert Config.__init__ is construct


def test_a_config_that_comes_from_no_file_is_as_it_was_given() -> None:
    config = {'sharp_optim_wrapper': SHARP, 'optim_wrapper': {'optimizer': SGD}}
    assert Config(config).to_dict() == config


def test_as_written_ends_with_its_block(tmp_path: Path) -> None:
    file = write(tmp_path, [RECIPES['simcc'], fragment('sam')])
    with as_written():
        with as_written():
            assert 'type' not in Config.fromfile(file).optim_wrapper
        assert 'type' not in Config.fromfile(file).optim_wrapper
    with pytest.raises(FileNotFoundError), as_written():
        Config.fromfile(tmp_path / 'nowhere.py')
    assert Config.fromfile(file).optim_wrapper.type == 'SAMOptimWrapper'


@pytest.mark.slow
def test_a_program_that_knows_us_by_custom_imports_alone(tmp_path: Path) -> None:
    """As MMPose's own tools, with the fragment named by its path."""
    file = write(tmp_path, ['mmpose::_base_/default_runtime.py', str(FRAGMENTS / 'sam.py')])
    file.write_text(file.read_text() + '\noptim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))')
    code = f'from mmengine.config import Config; print(Config.fromfile({str(file)!r}).optim_wrapper.type)'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ['SAMOptimWrapper']


NEW_STYLE = """
from mmengine.config import read_base
from mmengine.optim import AmpOptimWrapper
from torch.optim import SGD, Adam

with read_base():
    from .sam import *
    {more}

optim_wrapper = dict(type=AmpOptimWrapper, dtype='bfloat16', optimizer=dict(type=SGD, lr=0.1, weight_decay=0.1))
model = dict(type=Adam, backbone=dict(type=SGD))
"""


def test_new_style_configs(tmp_path: Path, quantization: None) -> None:
    """Their imports are made when they are used, and are written out as text: they must stay what they are."""
    shutil.copy(FRAGMENTS / 'sam.py', tmp_path)
    write(tmp_path, [])
    (tmp_path / 'new.py').write_text(NEW_STYLE.format(more='from .w4a4 import *'))
    cfg = Config.fromfile(tmp_path / 'new.py')
    found = cfg.to_dict()
    assert found['optim_wrapper'] == {
        'type': 'SAMOptimWrapper', 'rho': 0.02, 'adaptive': 'tensor', 'perturb': 'weights', 'dtype': 'bfloat16',
        'optimizer': {'type': 'torch.optim.SGD', 'lr': 0.1, 'weight_decay': 0.1},
    }  # fmt: skip
    assert found['model'] == {
        'type': 'QuantizedModel', 'model': {'type': 'torch.optim.Adam'}, 'policy': POLICY,
        'backbone': {'type': 'torch.optim.SGD'},
    }  # fmt: skip
    assert cfg.optim_wrapper.optimizer.type is torch.optim.SGD
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').optim_wrapper.type == 'SAMOptimWrapper'


def test_a_new_style_config_without_our_keys_is_untouched(tmp_path: Path) -> None:
    (tmp_path / 'new.py').write_text(NEW_STYLE.format(more='').replace('from .sam import *', 'pass'))
    file = tmp_path / 'new.py'
    file.write_text(file.read_text().replace('with read_base():\n    pass', ''))
    assert Config.fromfile(file).to_dict()['optim_wrapper']['type'] == 'mmengine.optim.AmpOptimWrapper'


def test_training_by_a_fragment_alone(tmp_path: Path) -> None:
    plain = toy_config(tmp_path / 'work', optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.01}}, custom_hooks=[])
    Config(plain).dump(tmp_path / 'plain.py')
    runner = Runner.from_cfg(Config.fromfile(write(tmp_path, ['plain.py', fragment('sam')])))
    runner.train()
    assert isinstance(runner.optim_wrapper, SAMOptimWrapper)
    assert runner.optim_wrapper.last_step is not None
    assert 'train/sharpness/sharpness' in runner.message_hub.log_scalars


# -------------------------------------------------------------------- tools
@pytest.mark.parametrize('option', ['optim_wrapper.rho', 'sharp_optim_wrapper.rho'])
def test_options_for_the_wrapper_by_either_name(tmp_path: Path, option: str) -> None:
    cfg = load(write(tmp_path, [RECIPES['simcc'], fragment('ausam')]), **{option: 0.3})
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.rho) == ('AUSAMOptimWrapper', 0.3)


def test_options_speak_of_the_keys_as_they_are_written(tmp_path: Path, quantization: None) -> None:
    file = write(tmp_path, [RECIPES['simcc'], 'w4a4', fragment('sam')])
    options = {
        'model.head.simcc_split_ratio': 3.0, 'sharp_quantization.policy.weight_bit_width': 8,
        'sharp_quantization.calibration.num_batches': 5, 'sharp_hook.interval': 7,
    }  # fmt: skip
    cfg = load(file, **options)
    assert cfg.model.policy.to_dict() == {'weight_bit_width': 8, 'act_bit_width': 4}
    assert cfg.model.head.simcc_split_ratio == 3.0
    assert cfg.custom_hooks[-2:] == [
        {'type': 'SharpnessHook', 'interval': 7}, {'type': 'CalibrationHook', 'num_batches': 5},
    ]  # fmt: skip
    assert load(file, sharp_quantization=None).model.type == 'TopdownPoseEstimator'
    # Without options a tool has what every other reader has.
    everyone = Config.fromfile(file)
    everyone.work_dir, everyone.launcher = 'work_dirs/user', 'none'
    assert load(file).to_dict() == everyone.to_dict()


@pytest.mark.parametrize(
    ('option', 'instead'),
    [
        ('sharp_optim_wrapper.rho', 'optim_wrapper is not made from .* as optim_wrapper.rho'),
        ('sharp_hook.interval', 'custom_hooks is not made from'),
        ('sharp_quantization.policy.weight_bit_width', 'model is not made from .* as model.policy.weight_bit_width'),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, option: str, instead: str, quantization: None) -> None:
    """A copy of a config, as training leaves it in the work directory, has taken its fragments over."""
    cfg = Config.fromfile(write(tmp_path, [RECIPES['simcc'], 'w4a4', fragment('sam')]))
    cfg.dump(tmp_path / 'copy.py')
    with pytest.raises(UsageError, match=f'{option}=…: without effect, .*{instead}'):
        load(tmp_path / 'copy.py', **{option: 8})


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('sharp_quantization = dict(polcy=dict())', "sharp_quantization=.*'polcy'.*must be a dict with .* policy"),
        ('sharp_quantisation = dict(policy=dict())', "sharp_quantisation is no key .* mean 'sharp_quantization'"),
        ('sharp_optim_wraper = None', "sharp_optim_wraper is no key .* mean 'sharp_optim_wrapper'"),
        (
            'sharp_1234567890123 = 1',
            'sharp_1234567890123 is no key .*there are sharp_hook, sharp_optim_wrapper, sharp_quantization',
        ),
    ],
)
def test_a_bad_form_is_the_users_error(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path, [RECIPES['simcc'], 'w4a4', fragment('sam')], line)
    with pytest.raises(UsageError, match=message):
        load(file)


def test_a_misspelt_key_is_refused_without_a_fragment_and_by_every_reader(tmp_path: Path) -> None:
    file = write(tmp_path, [RECIPES['simcc']], 'sharp_quantisation = dict(policy=dict())')
    for read in (Config.fromfile, load):
        with pytest.raises((ValueError, UsageError), match="did you mean 'sharp_quantization'"):
            read(file)


@pytest.mark.parametrize(
    'name', ['base', 'sam', 'looksam', 'friendlysam', 'gsam', 'wsam', 'msam', 'esam-history', 'ausam']
)
def test_the_benchmark_compares_the_same_methods_as_by_the_lines(tmp_path: Path, name: str) -> None:
    bases = [RECIPES['rtmpose'], fragment('asam')]
    method = parse_methods([name])[name]
    alone = wrapper_settings(load(write(tmp_path, bases)), method)
    lines = wrapper_settings(load(write(tmp_path, bases, *EXPLICIT)), method)
    assert alone == lines
    assert alone['type'] == method['type']
    assert alone.get('rho') == (None if name == 'base' else 0.5)


# -------------------------------------------------------------------- quantization
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_fragment_quantizes_the_recipes_model(tmp_path: Path, recipe: str, quantization: None) -> None:
    cfg = Config.fromfile(write(tmp_path, [RECIPES[recipe], 'w4a4', fragment('sam')]))
    with as_written():
        written = Config.fromfile(tmp_path / 'user.py')
    theirs = written.to_dict()['model']
    model = cfg.to_dict()['model']
    assert (model.pop('type'), model.pop('policy')) == ('QuantizedModel', POLICY)
    # Everything else is where programs look for it.
    assert model.pop('model') == theirs.pop('type')
    assert model == theirs
    assert model['_scope_'] == 'mmpose'
    assert cfg.custom_imports.imports == ['mm_sharp', 'mm_sharp.quantization']
    assert cfg.custom_hooks[-1] == {'type': 'CalibrationHook', 'num_batches': 2}
    cfg.model.policy.weight_bit_width = 8
    assert cfg.sharp_quantization.policy.weight_bit_width == 4


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('name', [path.stem for path in (FRAGMENTS / 'quantization').glob('*.py')])
def test_our_own_fragments_make_a_whole_config(tmp_path: Path, recipe: str, name: str, quantization: None) -> None:
    bases = [RECIPES[recipe], fragment(f'quantization/{name}'), fragment('ausam')]
    cfg = Config.fromfile(write(tmp_path, bases, "load_from = 'float.pth'"))
    own = Config.fromfile(FRAGMENTS / 'quantization' / f'{name}.py').sharp_quantization
    assert (cfg.model.type, cfg.model.policy) == ('QuantizedModel', own.policy)
    assert cfg.optim_wrapper.type == 'AUSAMOptimWrapper'
    assert cfg.custom_hooks[-2:] == [{'type': 'SharpnessHook'}, {'type': 'CalibrationHook', **own.calibration}]
    check_wrappers(cfg)


def test_a_model_with_arguments_of_these_names(quantization: None) -> None:
    model = {'type': 'Wrapped', 'model': {'type': 'Net'}}
    cfg = applied(sharp_quantization={'policy': POLICY}, model=deepcopy(model))
    assert cfg.model.to_dict() == {'type': 'QuantizedModel', 'model': model, 'policy': POLICY}


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        (None, ['mm_sharp.quantization']),
        ({'imports': 'mine'}, ['mine', 'mm_sharp.quantization']),
        ({'imports': ['mine'], 'allow_failed_imports': True}, ['mine', 'mm_sharp.quantization']),
        ({'imports': ['mm_sharp.quantization']}, ['mm_sharp.quantization']),
    ],
)
def test_the_import_is_added_once(before: Any, after: list[str], quantization: None) -> None:
    cfg = applied(sharp_quantization={'policy': POLICY}, model={'type': 'Net'}, custom_imports=before)
    assert cfg.custom_imports.imports == after
    assert cfg.custom_imports.get('allow_failed_imports', False) == (before or {}).get('allow_failed_imports', False)


@pytest.mark.parametrize(
    ('changes', 'hooks'),
    [
        ({}, []),  # every run that trains a quantized model has one
        ({'calibration': {}}, [{'type': 'CalibrationHook'}]),
        ({'calibration': {'num_batches': 3}}, [{'type': 'CalibrationHook', 'num_batches': 3}]),
        ({'calibration': None}, []),
    ],
)
def test_calibration_becomes_a_hook(changes: dict[str, Any], hooks: list[Any], quantization: None) -> None:
    cfg = applied(sharp_quantization={'policy': POLICY, **changes}, model={'type': 'Net'})
    assert cfg.get('custom_hooks', []) == hooks
    own = [{'type': 'CalibrationHook', 'num_batches': 99}]
    cfg = applied(sharp_quantization={'policy': POLICY, **changes}, model={'type': 'Net'}, custom_hooks=own)
    assert cfg.custom_hooks == own


@pytest.mark.parametrize(
    'settings',
    [
        'w4a4',
        {'policy': 'w4a4'},
        {'calibration': {}},
        {'policy': {}, 'calibration': 16},
        {'policy': {}, 'calibraton': {}},
    ],
    ids=str,
)
def test_a_bad_quantization_is_refused(settings: Any) -> None:
    right = r'must be a dict with .* policy .* calibration\. Write sharp_quantization = dict\(policy='
    with pytest.raises(ValueError, match=re.escape(f'sharp_quantization={settings!r} is not allowed') + f'.*{right}'):
        applied(sharp_quantization=settings, model={'type': 'Net'})


def test_a_quantized_model_of_ones_own_keeps_its_policy(quantization: None) -> None:
    model = {'type': 'QuantizedModel', 'model': {'type': 'Net'}, 'policy': {'weight_bit_width': 2}}
    cfg = applied(sharp_quantization={'policy': POLICY}, model=deepcopy(model), optim_wrapper={'optimizer': SGD})
    assert cfg.model.to_dict() == model
    assert 'custom_hooks' not in cfg
    assert cfg.custom_imports.imports == ['mm_sharp.quantization']


def test_without_brevitas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith('mm_sharp.quantization')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'brevitas', None)  # as if it were not installed
    file = write(tmp_path, ['w4a4'], "model = dict(type='Net')")
    with pytest.raises(ImportError, match=r'pip install "?mm_sharp\[quant\]'):
        Config.fromfile(file)
    with pytest.raises(UsageError, match=r'pip install "?mm_sharp\[quant\]'):
        load(file)


# -------------------------------------------------------------------- the old name of sharp_quantization
@pytest.mark.parametrize('settings', [{'policy': 'int8'}, {'policy': {'bits': 4}}, {'bits': 4}, {}, 'int8', 8], ids=str)
@pytest.mark.parametrize('bases', [[], [fragment('sam')]], ids=['alone', 'SAM'])
def test_another_projects_quantization_is_left_alone(
    tmp_path: Path, settings: Any, bases: list[str], said: list[str]
) -> None:
    """Its model is built in float, whether the config uses the rest of ours or not."""
    file = write(tmp_path, [RECIPES['simcc'], *bases], f'quantization = {settings!r}')
    cfg, tools = Config.fromfile(file), load(file)
    assert cfg.model.type == tools.model.type == 'TopdownPoseEstimator'
    assert cfg.to_dict()['quantization'] == tools.to_dict()['quantization'] == settings
    if isinstance(settings, dict):
        assert load(file, **{'quantization.policy': 'int4'}).quantization.policy == 'int4'
    told = bases and settings == {'policy': {'bits': 4}}
    line = 'is not read by mm_sharp: to quantize the model, write sharp_quantization = dict(policy=dict('
    assert [line in one for one in said] == ([True] * 2 if told else [])


@pytest.mark.parametrize('settings', [{'policy': 'int8'}, {'bits': 4}, 'int8'], ids=str)
def test_another_projects_quantization_beside_our_fragment(tmp_path: Path, settings: Any, quantization: None) -> None:
    cfg = Config.fromfile(write(tmp_path, [RECIPES['simcc'], 'w4a4'], f'quantization = {settings!r}'))
    assert (cfg.model.type, cfg.model.policy, cfg.quantization) == ('QuantizedModel', POLICY, settings)


def test_the_old_name_is_refused_beside_the_new_one(tmp_path: Path) -> None:
    """A model must not be trained with other bits than the config says."""
    file = write(tmp_path, [RECIPES['simcc'], 'w4a4'], 'quantization = dict(policy=dict(weight_bit_width=8))')
    with pytest.raises(
        ValueError, match=r'quantization = .*8.*: the key is sharp_quantization now\. Write sharp_quant'
    ):
        Config.fromfile(file)
    with pytest.raises(UsageError, match="no 'quantization'; did you mean 'sharp_quantization'"):
        load(write(tmp_path, [RECIPES['simcc'], 'w4a4']), **{'quantization.policy.weight_bit_width': 8})


def test_another_projects_model_of_the_same_name_is_left_alone() -> None:
    model = {'type': 'QuantizedModel', 'net': {'type': 'Net'}, 'policy': {'bits': 4}}
    config = {'model': model, 'optim_wrapper': {'optimizer': SGD}, 'custom_imports': {'imports': ['theirs']}}
    assert applied(**deepcopy(config)).to_dict() == config


# -------------------------------------------------------------------- with Brevitas
# MMPose's, of its own use of torch.
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.cuda.amp.autocast.* is deprecated')
@pytest.mark.parametrize('recipe', RECIPES)
def test_mmposes_own_api_builds_the_quantized_model(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip('brevitas', reason='needs the extra: pip install mm_sharp[quant]')
    from mmpose.apis import init_model
    from mmpose.models import TopdownPoseEstimator

    model = init_model(str(write(tmp_path, [RECIPES[recipe], 'w4a4', fragment('ausam')], NARROW[recipe])), device='cpu')
    assert isinstance(model, TopdownPoseEstimator)
    assert model.quantization.layers
    assert any('tensor_quant' in name for name, _ in model.named_parameters())
