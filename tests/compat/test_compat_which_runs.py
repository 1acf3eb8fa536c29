"""The checkpoint hook is added to the runs that use this package, and to no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPERS, Registry
from mmengine.runner import Runner

from mm_sharp import SAMOptimWrapper
from mm_sharp.compat import PlainCheckpointHook
from mm_sharp.compat.checkpoint_hook import RestoreCheckpointHook, uses_mm_sharp
from tests.tiny_runs import PLAIN, SAM, Net, make_runner


class MySAM(SAMOptimWrapper):
    """A user's own variant."""


def hooks_of(runner: Runner) -> list[type]:
    kinds = [type(hook) for hook in runner.hooks]
    return [kind for kind in kinds if kind in (PlainCheckpointHook, RestoreCheckpointHook)]


@pytest.fixture
def child_registry() -> Any:
    registry = Registry('optim_wrapper', parent=OPTIM_WRAPPERS, scope='toyscope')
    registry.register_module(module=MySAM)
    yield registry
    del OPTIM_WRAPPERS._children['toyscope']


ours = [
    SAM,
    {**SAM, 'type': 'mmengine.SAMOptimWrapper'},
    {**SAM, 'type': SAMOptimWrapper},
    {**SAM, 'constructor': 'DefaultOptimWrapperConstructor'},
    {'constructor': 'Multi', 'head': PLAIN, 'body': SAM},
    {**SAM, 'type': MySAM},
    {**SAM, 'type': 'MySAM'},
    {**SAM, 'type': 'toyscope.MySAM'},
    ConfigDict(SAM),
]
others = [
    PLAIN,
    {**PLAIN, 'type': 'AmpOptimWrapper'},
    {**PLAIN, 'type': OptimWrapper},
    {'optimizer': PLAIN['optimizer']},
    {**PLAIN, 'type': 'NoSuchWrapper'},
]


@pytest.mark.parametrize('optim_wrapper', ours, ids=str)
def test_active_with_our_wrapper(tmp_path: Path, child_registry: Registry, optim_wrapper: Any) -> None:
    runner = make_runner(tmp_path, optim_wrapper)
    assert hooks_of(runner) == [RestoreCheckpointHook, PlainCheckpointHook], 'first of all and last of all'
    assert type(runner.hooks[0]) is RestoreCheckpointHook
    assert type(runner.hooks[-1]) is PlainCheckpointHook


@pytest.mark.parametrize('optim_wrapper', others, ids=str)
def test_not_active_without(tmp_path: Path, optim_wrapper: Any) -> None:
    assert hooks_of(make_runner(tmp_path, optim_wrapper)) == []


def test_active_with_built_wrappers(tmp_path: Path) -> None:
    model = Net()
    sam = SAMOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    plain = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    for wrapper, active in [
        (sam, True),
        (OptimWrapperDict(a=plain, b=sam), True),
        (plain, False),
        (OptimWrapperDict(a=plain), False),
    ]:
        assert bool(hooks_of(make_runner(tmp_path, wrapper, model=model))) is active
        assert uses_mm_sharp(make_runner(tmp_path, wrapper, model=model)) is active


@pytest.mark.parametrize('hook', [{'type': 'SharpnessHook'}, {'type': 'PlainCheckpointHook'}])
def test_active_with_our_hook(tmp_path: Path, hook: dict[str, str]) -> None:
    kinds = hooks_of(make_runner(tmp_path, PLAIN, custom_hooks=[hook]))
    assert kinds == [RestoreCheckpointHook, PlainCheckpointHook]


def test_not_active_in_a_run_that_only_tests(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, None, train_dataloader=None, train_cfg=None)
    assert hooks_of(runner) == []
