"""What is kept in a checkpoint: round trips, plain wrappers in both directions, exact resume."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper

from mm_sharp.errors import UserError
from mm_sharp.ops.module_state import ModuleStateBackup, StatePlan
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.rng import RandomState
from tests.checkpoints import through_disk
from tests.reliability import Holds
from tests.toys import CountingNet, batches, make, same_state
from tests.wrappers import DISTINCT, WRAPPERS, build, momentum_sgd

everywhere = pytest.mark.parametrize('name', WRAPPERS)
distinct = pytest.mark.parametrize('name', DISTINCT)


def planned(model: torch.nn.Module) -> tuple[StatePlan, list[torch.nn.Module]]:
    """Where a model has state, and its BatchNorms."""
    plan = StatePlan(ModuleTree(model))
    return plan, plan.norms


@everywhere
@pytest.mark.parametrize(('dtype', 'accumulative_counts'), [(None, 1), ('float16', 2)])
def test_resuming_equals_never_having_stopped(name: str, dtype: str | None, accumulative_counts: int) -> None:
    data = batches(10)
    kwargs = dict(dtype=dtype, accumulative_counts=accumulative_counts)
    straight, stopped, resumed = (make(dropout=0.3) for _ in range(3))
    torch.manual_seed(11)
    wrapper = build(name, straight, **kwargs)
    for batch in data:
        straight.train_step(batch, wrapper)

    torch.manual_seed(11)
    first = build(name, stopped, **kwargs)
    for batch in data[:6]:
        stopped.train_step(batch, first)
    saved = through_disk({'optimizer': first.state_dict(), 'model': stopped.state_dict()})

    torch.manual_seed(99)
    second = build(name, resumed, **kwargs)
    resumed.load_state_dict(saved['model'])
    second.load_state_dict(saved['optimizer'])
    second.initialize_count_status(resumed, 6, 10)
    for batch in data[6:]:
        resumed.train_step(batch, second)
    assert same_state(straight, resumed)


@distinct
@pytest.mark.parametrize('twin', [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_of_model_and_wrapper_trains_as_they_do(name: str, twin: Callable[[Any], Any]) -> None:
    data, model = batches(5), make(dropout=0.3)
    wrapper = build(name, model)
    for batch in data[:3]:
        model.train_step(batch, wrapper)
    other, others = twin((model, wrapper))
    before, random_state = copy.deepcopy(model), RandomState.capture()
    for batch in data[3:]:
        other.train_step(batch, others)
    assert same_state(model, before)
    random_state.restore()
    for batch in data[3:]:
        model.train_step(batch, wrapper)
    assert same_state(model, other)


@distinct
def test_a_plain_checkpoint_loads_with_a_warning(name: str, loading_log: list[str]) -> None:
    model = make()
    base = OptimWrapper(momentum_sgd(model))
    for batch in batches(2):
        model.train_step(batch, base)
    state = through_disk(base.state_dict())
    wrapper = build(name, model)
    wrapper.load_state_dict(state)
    assert 'holds no state of mm_sharp' in loading_log[0]
    momentum = wrapper.optimizer.state[model.head.weight]['momentum_buffer']
    assert torch.equal(momentum, base.optimizer.state[model.head.weight]['momentum_buffer'])


@distinct
@pytest.mark.parametrize('dtype', [None, 'float16'])
def test_our_checkpoint_loads_into_a_plain_wrapper(name: str, dtype: str | None) -> None:
    model = make()
    wrapper = build(name, model, dtype=dtype)
    model.train_step(batches(1)[0], wrapper)
    base = OptimWrapper(momentum_sgd(model))
    base.load_state_dict(through_disk(wrapper.state_dict()))
    model.train_step(batches(1)[0], base)


@distinct
def test_loading_does_not_change_the_callers_dict(name: str) -> None:
    model = make()
    wrapper = build(name, model, dtype='float16')
    model.train_step(batches(1)[0], wrapper)
    state = wrapper.state_dict()
    keys = set(state)
    build(name, model, dtype='float16').load_state_dict(state)
    assert set(state) == keys
    assert {'state', 'param_groups', 'loss_scaler', 'mm_sharp'} <= keys


def test_the_scale_is_resumed() -> None:
    model = make()
    wrapper = build('sam', model, dtype='float16', loss_scale=dict(init_scale=128.0))
    model.train_step(batches(1)[0], wrapper)
    other = build('sam', model, dtype='float16')
    other.load_state_dict(wrapper.state_dict())
    assert other.precision.scaler.get_scale() == 128.0


def test_a_newer_version_is_refused() -> None:
    wrapper = build('sam', make())
    state = wrapper.state_dict()
    state['mm_sharp'] = {**state['mm_sharp'], 'version': 999}
    with pytest.raises(ValueError, match='version 999'):
        wrapper.load_state_dict(state)


OTHERS = [(name, other) for name in WRAPPERS for other in ('sam', 'esam-history', 'ausam')]


@pytest.mark.parametrize(
    ('name', 'other'), [pair for pair in OTHERS if WRAPPERS[pair[0]][0] is not WRAPPERS[pair[1]][0]]
)
def test_another_wrappers_checkpoint_is_refused(name: str, other: str, holds: Holds) -> None:
    model = make()
    before, wrapper = build(other, model), build(name, model)
    model.train_step(batches(1)[0], before)
    expected = f"written by {type(before).__name__}.*type='{type(before).__name__}'.*load_from=…"
    with pytest.raises(UserError, match=expected):
        wrapper.load_state_dict(through_disk(before.state_dict()))
    assert not wrapper.optimizer.state
    holds('Checkpoints', f'of {type(before).__name__}', name, 'refused before anything is loaded')


@everywhere
@pytest.mark.parametrize('named', [True, False])
def test_another_base_optimizers_checkpoint_is_refused(name: str, named: bool, holds: Holds) -> None:
    """Named since it is; in older checkpoints, and plain ones, it shows in the hyperparameters."""
    model = make()
    adam = OptimWrapper(torch.optim.Adam(model.parameters()))
    model.train_step(batches(1)[0], adam)
    wrapper = build(name, model)
    state = {**through_disk(adam.state_dict())}
    if named:
        state['mm_sharp'] = {**wrapper.state_dict()['mm_sharp'], 'base_optimizer': 'Adam'}
    with pytest.raises(
        UserError, match='of Adam' if named else r'of another optimizer \(it has no dampening, momentum'
    ):
        wrapper.load_state_dict(state)
    assert not wrapper.optimizer.state
    holds('Checkpoints', "of another base optimizer (Adam's state for SGD)", name, 'refused before anything is loaded')


def test_flags_of_newer_torch_versions_may_be_missing() -> None:
    model = make()
    wrapper = build('sam', model)
    model.train_step(batches(1)[0], wrapper)
    state = wrapper.state_dict()
    for flag in ('maximize', 'foreach', 'differentiable', 'fused'):
        for group in state['param_groups']:
            group.pop(flag, None)
    build('sam', model).load_state_dict(state)
    assert wrapper.optimizer.state


@pytest.mark.parametrize('damage', ['groups', 'no groups', 'mm_sharp'])
def test_damaged_states_are_refused(damage: str) -> None:
    wrapper = build('sam', make())
    state = wrapper.state_dict()
    message = {'groups': 'of 3 parameters in 1 groups', 'no groups': 'lacks', 'mm_sharp': "'mm_sharp' must be a dict"}
    if damage == 'groups':
        state['param_groups'][0]['params'] = state['param_groups'][0]['params'][:3]
    elif damage == 'no groups':
        del state['param_groups']
    else:
        state['mm_sharp'] = [1]
    with pytest.raises(UserError, match=message[damage]):
        wrapper.load_state_dict(state)


def test_random_state_round_trip() -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    random.gauss(0, 1)
    saved = through_disk(RandomState.capture().state_dict())
    expected = draw()
    assert draw() != expected
    RandomState.from_state_dict(saved).restore()
    assert draw() == expected


def test_random_state_of_a_device_that_is_not_here_is_left_out() -> None:
    state = RandomState.capture().state_dict()
    state['devices'] = {'cuda:63': torch.zeros(16, dtype=torch.uint8)}
    assert RandomState.from_state_dict(state).devices == {}


def test_module_state_comes_back_with_its_storage() -> None:
    model, before = make(CountingNet), make(CountingNet)
    pointer = model.average.data_ptr()
    backup = ModuleStateBackup()
    backup.save(*planned(model))
    (batch,) = batches(1)
    model(**batch)
    assert not same_state(model, before)
    assert model.calls == 1
    backup.restore()
    assert same_state(model, before)
    assert model.calls == 0
    assert model.average.data_ptr() == pointer
    model(**batch)
    backup.restore()
    assert model.calls == 1, 'a second restore must do nothing'


def test_module_state_with_shared_memory_and_empty_buffers() -> None:
    module = torch.nn.Module()
    module.register_buffer('shared', torch.zeros(1, 3).expand(4, 3))
    module.register_buffer('none', None)
    module.register_buffer('empty', torch.zeros(0))
    backup = ModuleStateBackup()
    backup.save(*planned(module))
    module.shared = torch.ones(4, 3)
    backup.restore()
    assert module.shared.sum() == 0


class Odd(torch.nn.Module):
    """Instances of one class with attributes of different names and kinds."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_attributes_come_back_whatever_they_are_called() -> None:
    """Names are remembered by class: other names, added and deleted ones must not be overlooked."""
    kept, changed, other = torch.ones(3), [1], [2]
    model = torch.nn.Sequential(
        Odd(a=1, b=kept), Odd(b=2.5, c=True), Odd(), Odd(a=3, b=None), Odd(d=float('nan'), e='x', f=changed)
    )
    backup = ModuleStateBackup()
    for _ in range(2):  # the second time from memory
        first, second, third, fourth, fifth = model
        nan = fifth.d
        backup.save(*planned(model))
        first.a, first.b, second.c, fourth.a, fourth.b, fifth.d, fifth.e = 7, 8, False, 9, 10, 0.0, 'y'
        del second.b
        third.new, third.list = 11, other
        changed.append(3)
        first.training = False
        fifth.f = other
        backup.restore()
        assert (first.a, second.b, second.c, hasattr(third, 'new')) == (1, 2.5, True, False)
        assert (fourth.a, fourth.b, fifth.e) == (3, None, 'x')
        assert first.b is kept
        assert fifth.d is nan
        assert fifth.f is changed
        assert changed == [1]
        assert first.training is True
        assert not hasattr(third, 'list')
        # As many attributes under other names, and a number where there was none.
        del first.a
        first.z = 12
        backup.save(*planned(model))
        first.z = 13
        backup.restore()
        assert first.z == 12
        del first.z
        first.a = 1


def test_checkpoint_files_load_without_unpickling_code(tmp_path: Path) -> None:
    model = make()
    wrapper = build('sam', model)
    model.train_step(batches(1)[0], wrapper)
    torch.save(wrapper.state_dict(), tmp_path / 'state.pth')
    loaded = torch.load(tmp_path / 'state.pth', weights_only=True)
    assert loaded['mm_sharp']['wrapper'] == 'SAMOptimWrapper'
