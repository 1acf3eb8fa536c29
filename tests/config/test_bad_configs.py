"""A wrong config gives one line that names the key and shows the right form, which then works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn

from mm_sharp.cli import options as cli
from mm_sharp.ops.precision import Precision
from tests.bad_configs import CASES, QUANTIZATION, Bad
from tests.distributed import free_port
from tests.mmpose_cases import CASES as HEADS
from tests.reliability import Holds
from tests.tool_runs import tool
from tests.toys import ToyNet, toy_config

HELD = 'one line that names the key and shows the right form'
Train = Callable[..., tuple[int, str]]


@HOOKS.register_module(force=True)
class BuggyHook(Hook):
    """Looks up what is not there, after an iteration."""

    def __init__(self, wants: str) -> None:
        self.wants = wants

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        {}[self.wants]


@HOOKS.register_module(force=True)
class AnyIntervalHook(Hook):
    """A user's, with an interval of its own meaning."""

    def __init__(self, interval: Any) -> None:
        self.interval = interval


@MODELS.register_module(force=True)
class BuggyToy(ToyNet):
    """Takes any option, and has a bug with ``margin``: as it is made, or in its forward pass."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.where = options['where']
        self.fails('__init__')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.fails('forward')

    def fails(self, where: str) -> None:
        if self.where == f'{where}: KeyError':
            {}['margin']
        if self.where == f'{where}: TypeError':
            nn.ReLU(margin=1.0)  # type: ignore[call-arg]


@pytest.fixture(scope='module')
def trainer() -> ModuleType:
    """tools/train.py."""
    return tool('train')


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trainer: ModuleType
) -> Train:
    """Train the toy with a method by tools/train.py; returns its exit code and what it says on stderr."""
    # The tool has all runs of its process save plain checkpoints.
    monkeypatch.setattr('mm_sharp.compat.checkpoint_hook._in_every_run', False)

    def call(method: str, lines: str, *options: str) -> tuple[int, str]:
        folder = tmp_path / f'{tmp_path.name}-{len(list(tmp_path.iterdir()))}'
        folder.mkdir()
        config = toy_config(folder / 'run', train_cfg=dict(by_epoch=True, max_epochs=1))
        config['optim_wrapper']['type'] = f'{method}OptimWrapper'
        (folder / 'toy.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in config.items()))
        (folder / 'mine.py').write_text(f"_base_ = 'toy.py'\n{lines}")
        monkeypatch.setattr(sys, 'argv', ['tools/train.py', str(folder / 'mine.py'), *options])
        capsys.readouterr()
        code = cli.run_tool(trainer.main)
        return code, capsys.readouterr().err

    return call


def check(said: tuple[int, str], key: str, shows: str) -> None:
    """That a run has ended with one line which names ``key`` and has ``shows`` in it."""
    code, line = said
    assert (code, line.count('\n'), line[:17]) == (2, 1, 'train.py: error: '), line
    assert key in line
    assert shows in line


def name(case: Bad) -> str:
    return f'{case.method}: {case.what}'


@pytest.mark.parametrize('case', CASES, ids=name)
def test_a_bad_config_is_refused_in_one_line(case: Bad, train: Train, holds: Holds) -> None:
    if case in QUANTIZATION:
        pytest.importorskip('brevitas')
    check(train(case.method, case.lines), case.key, case.shows)
    if case.good:
        code, said = train(case.method, case.good)
        assert code == 0, f'the advice does not work: {said}'
    holds(
        'Bad configs', case.what, case.method, HELD + ('; followed, it trains' if case.good else ''), unit='bad configs'
    )


@pytest.mark.parametrize(
    ('head', 'method'),
    [('YOLOXPoseHead', 'ESAM'), ('YOLOXPoseHead', 'AUSAM'), ('RTMOHead', 'AUSAM'), ('CIDHead', 'ESAM')],
)
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_a_head_whose_rows_are_not_samples(head: str, method: str, train: Train, holds: Holds) -> None:
    (case,) = [case for case in HEADS if case.name == head]
    model = case.config().model
    small = {
        'type': 'mmpose.BottomupPoseEstimator',
        'backbone': {'type': 'mmpose.ResNet', 'depth': 18},
        'head': model.head,
    }
    lines = f"default_scope = 'mmpose'\nmodel = { ({'_delete_': True, **Config(small).to_dict()})!r}"
    check(train(method, lines), head, "optim_wrapper = dict(type='SAMOptimWrapper'")
    holds('Bad configs', f'{head}, whose rows are no samples', method, HELD, unit='bad configs')


@pytest.mark.parametrize('method', ['SAM', 'ESAM', 'AUSAM'])
def test_half_precision_that_this_torch_cannot_do(
    method: str, train: Train, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mm_sharp.ops.precision.torch.__version__', '2.2.0')
    check(train(method, "optim_wrapper = dict(dtype='float16')"), "dtype='float16'", "dtype='bfloat16'")
    assert train(method, "optim_wrapper = dict(dtype='bfloat16')")[0] == 0
    holds('Bad configs', 'float16 on the CPU of an old torch', method, HELD, unit='bad configs')


def test_bfloat16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch, holds: Holds) -> None:
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'an old GPU')
    with pytest.raises(ValueError, match=r"dtype='bfloat16' is not supported by an old GPU: use dtype='float16'"):
        Precision('SAMOptimWrapper', 'bfloat16', 'dynamic', torch.device('cuda'))
    holds('Bad configs', 'bfloat16 on a GPU without it', 'SAM', HELD, unit='bad configs')


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_a_loss_scale_for_another_dtype_is_checked_and_waits(dtype: str | None) -> None:
    """--amp and --cfg-options switch the dtype alone: a config may say the scale beforehand."""
    precision = Precision('SAMOptimWrapper', dtype, 512.0, torch.device('cpu'))
    assert precision.scaler is None
    with pytest.raises(ValueError, match='loss_scale=-1 is not allowed'):
        Precision('SAMOptimWrapper', dtype, -1, torch.device('cpu'))


STATIC = "model_wrapper_cfg = dict(type='MMDistributedDataParallel', static_graph=True)\n"


@pytest.mark.parametrize('method', ['SAM', 'ESAM', 'AUSAM'])
@pytest.mark.filterwarnings('ignore:`broadcast_buffers` is deprecated:FutureWarning')
def test_a_static_graph(method: str, train: Train, holds: Holds, monkeypatch: pytest.MonkeyPatch) -> None:
    place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), RANK='0', LOCAL_RANK='0', WORLD_SIZE='1')
    place.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')  # MMEngine warns that it sets them
    for variable, value in place.items():
        monkeypatch.setenv(variable, value)
    try:
        said = train(method, STATIC, '--launcher', 'pytorch')
        advice = 'Take static_graph=True out of model_wrapper_cfg' + (
            '' if method == 'ESAM' else ', or set sync_perturb'
        )
        check(said, 'static_graph=True', advice)
    finally:
        torch.distributed.destroy_process_group()
    holds('Bad configs', 'DDP with static_graph=True', method, HELD, unit='bad configs')


def test_a_bug_keeps_its_traceback(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the same kinds that do not come from the config are nobody's mistake but ours."""

    def broken(self: Any) -> None:
        raise TypeError("Widget.__init__() got an unexpected keyword argument 'colour'")

    monkeypatch.setattr(Runner, 'train', broken)
    with pytest.raises(TypeError, match='colour'):
        train('SAM', '')
    monkeypatch.setattr(Runner, 'train', lambda self: {}['a key'])
    with pytest.raises(KeyError, match='a key'):
        train('SAM', '')


@pytest.mark.parametrize('wants', ['dataset', 'optimizer', 'params'])
def test_a_bug_of_a_hook_keeps_its_traceback(wants: str, train: Train, tmp_path: Path) -> None:
    """Also where MMEngine hands an argument of this name to what it builds."""
    hook = dict(type='BuggyHook', wants=wants)
    schedule = dict(type='LinearLR', start_factor=0.1)
    with pytest.raises(KeyError, match=f"^'{wants}'$") as caught:
        train('SAM', f'custom_hooks = [{hook}]\nparam_scheduler = {schedule}')
    assert caught.traceback[-1].name == 'after_train_iter'
    with pytest.raises(KeyError, match=f"^'{wants}'$"):
        Runner.from_cfg(toy_config(tmp_path / 'runner', custom_hooks=[hook], param_scheduler=schedule)).train()


@pytest.mark.parametrize('error', [KeyError, TypeError])
@pytest.mark.parametrize('where', ['__init__', 'forward'])
def test_a_bug_of_a_model_that_takes_any_argument_keeps_its_traceback(
    where: str, error: type[Exception], train: Train
) -> None:
    with pytest.raises(error, match="'margin'") as caught:
        train('SAM', f"model = dict(type='BuggyToy', margin=1.0, where='{where}: {error.__name__}')")
    assert [entry.name for entry in caught.traceback][-2:] == [where, 'fails']


@pytest.mark.parametrize(
    ('kind', 'interval'),
    [('SharpnessHook', None), ('AnyIntervalHook', 0.5), ('AnyIntervalHook', [1, 2]), ('AnyIntervalHook', None)],
)
def test_an_interval_that_its_hook_allows(kind: str, interval: Any, train: Train) -> None:
    assert train('SAM', f'custom_hooks = [{dict(type=kind, interval=interval)}]')[0] == 0


def test_an_interval_of_none_that_its_hook_does_not_allow(train: Train) -> None:
    said = train('SAM', "default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=None))")
    check(said, 'default_hooks.checkpoint.interval=None', "dict(type='CheckpointHook', interval=50)")


@pytest.mark.parametrize(
    ('lines', 'says'),
    [
        ('optim_wrapper = dict(type=3)', 'optim_wrapper.type: 3 is not registered'),
        ('optim_wrapper = dict(type=None)', 'optim_wrapper.type: None is not registered'),
        ("optim_wrapper = dict(constructor='')", "optim_wrapper.constructor: '' is not registered"),
        (
            'default_scope = 3',
            "default_scope=3 is not allowed: it must be a name. Write for example: default_scope = 'mm",
        ),
        ('optim_wrapper = dict(paramwise_cfg={1: 2})', 'there is no key 1; there are bias_decay_mult, '),
        (
            'optim_wrapper = dict(paramwise_cfg=dict(custom_keys={0: dict(lr_mult=0.1)}))',
            'custom_keys.0 is no part of the name of a parameter',
        ),
        (
            'optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head={1: 2, "lr_mul": 1})))',
            "custom_keys.head.lr_mul: did you mean 'lr_mult'?",
        ),
    ],
)
def test_numbers_and_nothing_in_place_of_names(lines: str, says: str, train: Train) -> None:
    check(train('SAM', lines), says, '')


def test_a_hook_that_looks_up_its_argument(train: Train) -> None:
    said = train('SAM', "default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best='PCK', rule='max'))")
    check(said, 'default_hooks.checkpoint: ', "dict(type='CheckpointHook', interval=50)")
