"""torch.compile: the same training as without it, or an error that says what to compile instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mm_sharp.errors import UnsupportedError
from mm_sharp.hooks.compile import parts_without_losses
from tests.distributed import run
from tests.mmpose_cases import CASES, QUIET, build
from tests.rank_toys import digest
from tests.reliability import Holds
from tests.toys import batches, make, same_state, toy_config
from tests.wrappers import build as wrap

pytestmark = [
    *QUIET,
    # torch's own, of what its compiler imports and does.
    pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::ResourceWarning'),
    pytest.mark.filterwarnings('ignore:.*Profiler record function', 'ignore:The .grad attribute of a Tensor'),
]

OPTIONS: dict[str, dict[str, Any]] = {
    'SAM': {},
    'ESAM': {'beta': 1.0},
    'AUSAM': {},
}
SECTION = 'torch.compile'
SAME = 'weights equal to an uncompiled run, bit for bit'


@pytest.fixture(autouse=True)
def compiler() -> Iterator[Any]:
    """torch's compiler, with nothing in its cache and its counters at 0."""
    import torch._dynamo as dynamo  # takes seconds

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


def trained(folder: Path, method: str, kind: Any = Runner, **changes: Any) -> Any:
    config = toy_config(folder / method, train_cfg=dict(by_epoch=True, max_epochs=1), env_cfg={}, **changes)
    config['model'] = dict(type='ToyNet', dropout=0.3)
    config['optim_wrapper'].update(type=f'{method}OptimWrapper', **OPTIONS[method])
    runner = kind.from_cfg(config)
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize('method', OPTIONS)
def test_a_compiled_run_is_the_plain_run_bit_for_bit(method: str, tmp_path: Path, compiler: Any, holds: Holds) -> None:
    plain = trained(tmp_path / 'plain', method)
    compiled = trained(tmp_path / 'compiled', method, compile=dict(backend='eager'))
    assert same_state(plain.model, compiled.model)
    counters = compiler.utils.counters
    # Convolution, norm and head; ESAM runs each with other sizes and without gradients as well.
    assert counters['stats']['unique_graphs'] >= 3
    assert sum(counters['graph_break'].values()) == 0
    parts = [compiled.model.conv, compiled.model.norm, compiled.model.head, compiled.model]
    assert not any({'forward', 'train_step'} & vars(part).keys() for part in parts), 'something is left behind'
    holds(SECTION, "compile=dict(backend='eager') in the config", method, SAME, unit='compiled runs')


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_step_through_autograd(tmp_path: Path, holds: Holds) -> None:
    runs = [
        trained(tmp_path / str(i), 'AUSAM', **c) for i, c in enumerate(({}, dict(compile=dict(backend='aot_eager'))))
    ]
    assert same_state(*(run.model for run in runs))
    holds(SECTION, "compile=dict(backend='aot_eager') in the config", 'AUSAM', SAME, unit='compiled runs')


def test_flexible_runner_compiles_the_forward(tmp_path: Path, holds: Holds) -> None:
    plain = trained(tmp_path / 'plain', 'AUSAM', FlexibleRunner)
    compiled = trained(tmp_path / 'compiled', 'AUSAM', FlexibleRunner, compile=dict(backend='eager'))
    assert same_state(plain.model, compiled.model)
    holds(SECTION, "FlexibleRunner's compile", 'AUSAM', SAME, unit='compiled runs')


@pytest.mark.slow
def test_other_wrappers_are_compiled_as_mmengine_does(tmp_path: Path, compiler: Any) -> None:
    config = toy_config(
        tmp_path / 'base', compile=dict(backend='eager'), train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='CompileHook')],
    )  # fmt: skip
    runner = Runner.from_cfg(config)
    runner.train()
    assert 'train_step' in vars(runner.model)


def test_esam_is_refused(tmp_path: Path, holds: Holds) -> None:
    config = toy_config(tmp_path / 'esam', compile=dict(backend='eager'))
    config['optim_wrapper']['type'] = 'ESAMOptimWrapper'
    with pytest.raises(UnsupportedError, match=r'compile conv, norm, head anew .*compile=False.*beta=1.0'):
        Runner.from_cfg(config).train()
    holds(SECTION, 'compile=True with beta below 1', 'ESAM', 'an error that shows what to write', unit='bad configs')


def step(model: nn.Module, called: nn.Module, name: str, **options: Any) -> None:
    torch.manual_seed(3)
    wrapper = wrap(name, model, **options)
    for batch in batches(3):
        with wrapper.optim_context(called):
            losses = called(**batch)
        wrapper.update_params(model.parse_losses(losses)[0])


def test_sam_trains_a_model_that_was_compiled_before(holds: Holds) -> None:
    plain, compiled = make(dropout=0.3), make(dropout=0.3)
    step(plain, plain, 'sam-weights', perturb=dict(norm=False, include='^conv'))
    step(compiled, torch.compile(compiled, backend='eager'), 'sam-weights', perturb=dict(norm=False, include='^conv'))
    assert same_state(plain, compiled)
    holds(
        SECTION,
        'torch.compile(model) by hand',
        'SAM',
        'weights equal to the plain ones, bit for bit',
        unit='compiled runs',
    )


@pytest.mark.parametrize('name', ['esam', 'ausam'])
@pytest.mark.parametrize('how', ['module', 'method', 'forward'])
def test_a_loss_that_was_compiled_is_refused(name: str, how: str, holds: Holds) -> None:
    model = make()
    called: Any = model
    if how == 'module':
        called = torch.compile(model, backend='eager')
    elif how == 'method':
        model.compile(backend='eager')
    else:
        model.forward = torch.compile(model.forward, backend='eager')
    with pytest.raises(UnsupportedError, match=r'hold of the whole ToyNet.*model.backbone.compile\(\)'):
        step(model, called, name)
    holds(SECTION, 'the whole model compiled by hand', name, 'an error that shows what to write', unit='bad configs')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sam', 'esam', 'ausam'])
def test_a_step_that_was_compiled_is_refused(name: str, holds: Holds) -> None:
    model = make()
    wrapper = wrap(name, model)
    model.train_step = torch.compile(model.train_step, backend='eager')  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"hold of the model's train_step.*model.backbone.compile\(\)"):
        model.train_step(batches(1)[0], wrapper)
    holds(SECTION, 'train_step compiled by hand', name, 'an error that shows what to write', unit='bad configs')


def test_what_is_compiled_in_a_pose_estimator() -> None:
    (case,) = [case for case in CASES if case.name == 'SimCCHead']
    with DefaultScope.overwrite_default_scope('mmpose'):
        model = build(case.config())
    assert [name for name, _ in parts_without_losses(model)] == ['backbone']


def trained_on_ranks(rank: int, processes: int, folder: str) -> list[tuple[str, str]]:
    """A hash of the weights of each method's plain and compiled run under DDP."""
    ddp = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    ours = dict(launcher='pytorch', model_wrapper_cfg=ddp)
    return [
        tuple(
            digest(trained(Path(folder) / f'ranks{number}', method, **ours, **compiled).model)
            for number, compiled in enumerate(({}, dict(compile=dict(backend='aot_eager'))))
        )
        for method in OPTIONS
    ]  # type: ignore[return-value]


@pytest.mark.thorough
def test_two_ranks_compile_their_parts(tmp_path: Path, holds: Holds) -> None:
    first, second = run(trained_on_ranks, 2, str(tmp_path))
    assert first == second
    for method, (plain, compiled) in zip(OPTIONS, first, strict=True):
        assert plain == compiled
        holds(SECTION, "compile=dict(backend='aot_eager') under DDP, 2 ranks", method, SAME, unit='compiled runs')
