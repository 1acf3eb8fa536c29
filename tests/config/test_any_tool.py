"""The most natural mistakes: MMPose's own tools/train.py says of them what ours does, in one line."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmpose
import pytest
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

import mm_sharp
from mm_sharp.cli import options as cli
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError, UserError
from tests.bad_configs import Bad, loader, wrapper
from tests.tool_runs import tool
from tests.toys import make, toy_config
from tests.wrappers import momentum_sgd

MMPOSE = Path(mmpose.__file__).parent / '.mim' / 'tools' / 'train.py'
SGD = "optimizer=dict(type='SGD', lr=0.01)"
IN_PLACE = f"optim_wrapper = dict(type='SAMOptimWrapper', {SGD[:-1]}, momentum=0.9), …)"

# fmt: off
MISTAKES = (
    wrapper('a typing error', 'AUSAM', 'sample_ratio=0.5', '', shows="did you mean 'sampling_ratio'"),
    wrapper("another method's argument", 'SAM', 'sampling_ratio=0.5', '', key='sampling_ratio=0.5 is not allowed',
        shows="dict(type='AUSAMOptimWrapper', sampling_ratio=0.5, ...)"),
    wrapper('rho as text', 'SAM', "rho='0.05'", '', shows='a finite number in [0, inf). Write for example: '),
    wrapper('rho below 0', 'AUSAM', 'rho=-0.05', '', shows="dict(type='AUSAMOptimWrapper', rho=0.05, ...)"),
    wrapper("a choice with a typing error: the nearest one, and not the first", 'AUSAM', "draw='systematc'", '',
        shows="dict(type='AUSAMOptimWrapper', draw='systematic', ...)"),
    wrapper('what a uniform draw has no use for', 'AUSAM', "draw='uniform', prefer='small'", '',
        key="prefer='small' is not allowed", shows="draw='uniform' keeps no scores, so leave it out"),
    wrapper("a dtype's short name", 'SAM', "dtype='fp16'", '', shows="'float16'"),
    wrapper('clip_grad as a number', 'ESAM', 'clip_grad=1.0', '', shows='clip_grad=dict(max_norm=1.0)'),
    wrapper('ours in the place of the optimizer', 'SAM',
        "_delete_=True, type='OptimWrapper', optimizer=dict(type='SAMOptimWrapper', rho=0.05)", '',
        key="optim_wrapper.optimizer.type='SAMOptimWrapper'", shows=IN_PLACE),
    wrapper("MMEngine's in the place of the optimizer", 'SAM',
        f"optimizer=dict(_delete_=True, type='OptimWrapper', {SGD})", '',
        key="optim_wrapper.optimizer.type='OptimWrapper'", shows=IN_PLACE),
    wrapper("rho among the optimizer's arguments", 'SAM', 'optimizer=dict(rho=0.05)', '',
        key="unexpected keyword argument 'rho'", shows="optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"),
    wrapper('an unknown wrapper', 'SAM', "type='SAMOptimWraper'", '', key='optim_wrapper.type',
        shows="did you mean 'SAMOptimWrapper'"),
    loader('drop_last beside the sampler', 'AUSAM', "drop_last=True, batch_sampler=dict(type='AUSAMSampler')", '',
        key='train_dataloader.drop_last=True', shows="drop_last=False, batch_sampler=dict(type='AUSAMSampler'"),
    loader('the batch sampler as a sampler', 'AUSAM', "sampler=dict(_delete_=True, type='AUSAMSampler')", '',
        key='train_dataloader.sampler', shows="batch_sampler=dict(type='AUSAMSampler'"),
    loader('samples without ids', 'AUSAM', "dataset=dict(type='NamelessSamples')", '', key='sample_idx',
        shows="type='IndexedDataset', dataset="),
    wrapper('SharpnessHook without a wrapper of ours', 'SAM', f"_delete_=True, type='OptimWrapper', {SGD}", '',
        key='SharpnessHook', shows="optim_wrapper = dict(type='SAMOptimWrapper', ...)"),
)
# fmt: on
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config of the toy with a method and a user's lines."""

    def call(method: str, lines: str) -> Path:
        folder = tmp_path / f'{tmp_path.name}-{len(list(tmp_path.iterdir()))}'
        folder.mkdir()
        config = toy_config(folder / 'run', train_cfg=dict(by_epoch=True, max_epochs=1))
        config['optim_wrapper']['type'] = f'{method}OptimWrapper'
        config['custom_imports'] = dict(imports=['mm_sharp', 'tests.bad_configs'])
        (folder / 'toy.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in config.items()))
        (folder / 'mine.py').write_text(f"_base_ = 'toy.py'\n{lines}")
        return folder / 'mine.py'

    return call


def mmposes_tool(monkeypatch: pytest.MonkeyPatch, config: Path, *options: str) -> None:
    """Run MMPose's tools/train.py, as a program, in this process."""
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config), *options])
    monkeypatch.setenv('LOCAL_RANK', '0')
    runpy.run_path(str(MMPOSE), run_name='__main__')


@pytest.mark.parametrize('case', MISTAKES, ids=lambda case: case.what)
def test_the_same_line(
    case: Bad, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('mm_sharp.compat.checkpoint_hook._in_every_run', False)
    with pytest.raises((UsageError, UserError)) as error:
        mmposes_tool(monkeypatch, write(case.method, case.lines))
    line = ' '.join(str(error.value).split())
    assert case.key in line
    assert case.shows in line
    monkeypatch.setattr(sys, 'argv', ['train.py', str(write(case.method, case.lines))])
    capsys.readouterr()
    assert cli.run_tool(tool('train').main) == 2
    assert capsys.readouterr().err == f'train.py: error: {line}\n'


@pytest.mark.parametrize(
    ('hook', 'says'),
    [("type='SharpnesHook'", "custom_hooks.0.type: 'SharpnesHook' is not registered; did you mean 'SharpnessHook'?"),
     ("type='SharpnessHook', intervals=5", 'custom_hooks.0.intervals: SharpnessHook has no such argument')],
)  # fmt: skip
def test_hooks(hook: str, says: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        mmposes_tool(monkeypatch, write('AUSAM', f'custom_hooks = [dict({hook})]'))


def test_amp(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write('AUSAM', '')
    with pytest.raises(ValueError, match='--amp') as error:
        mmposes_tool(monkeypatch, config, '--amp')
    assert '\n' not in str(error.value)
    assert "write optim_wrapper = dict(type='AUSAMOptimWrapper', dtype='float16', ...)" in str(error.value)
    mmposes_tool(monkeypatch, config, '--cfg-options', 'optim_wrapper.dtype=bfloat16')


def test_amp_of_another_program_is_its_own(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['mine.py', '--amp'])
    config = write('AUSAM', '')
    assert preflight.Config.fromfile(config).optim_wrapper.type == 'AUSAMOptimWrapper'


def test_what_is_no_optimizer_is_refused_by_the_constructor_too() -> None:
    for wrong in (OptimWrapper(momentum_sgd(make())), dict(type='SGD', lr=0.1)):
        with pytest.raises(ValueError, match=r'optimizer=.* is not allowed: it must be an optimizer of torch'):
            mm_sharp.SAMOptimWrapper(wrong)


def test_built_parts_and_runs_without_us_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    built: list[Any] = [
        dict(optim_wrapper=dict(type='SAMOptimWrapper', optimizer=momentum_sgd(model)), model=model),
        dict(optim_wrapper=mm_sharp.SAMOptimWrapper(momentum_sgd(model)), model=model),
    ]
    for number, parts in enumerate(built):
        Runner.from_cfg(toy_config(tmp_path / f'run{number}', **parts)).train()
    monkeypatch.setattr(preflight, '_check', lambda runner: pytest.fail('not a run of ours'))
    plain = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    Runner.from_cfg(toy_config(tmp_path / 'plain', optim_wrapper=plain, custom_hooks=[])).train()
    misspelt = dict(type='OptimWraper', optimizer=dict(type='SGD', lr=0.01))
    with pytest.raises(KeyError, match='OptimWraper is not in the'):
        Runner.from_cfg(toy_config(tmp_path / 'misspelt', optim_wrapper=misspelt, custom_hooks=[])).train()
