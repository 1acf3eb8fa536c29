"""A fault injected at every point of a step leaves everything as before the step, and the next step works."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from mm_sharp.ops.gradients import GradientStash
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.module_state import ModuleStateBackup
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rng import RandomState
from mm_sharp.ops.tensor_backup import TensorBackup
from mm_sharp.samples.history import SampleHistory
from mm_sharp.step import ascent
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.reliability import Holds
from tests.toys import Batch, CountingNet, Notes, batches, make
from tests.wrappers import build

METHODS = ('sam', 'esam', 'esam-history', 'ausam', 'ausam-reweight', 'ausam-loader')
HELD = 'weights, buffers, optimizer, gradients, flags, hooks, scaler, history, random state; the next step works'
SETTINGS: tuple[tuple[str | None, int], ...] = ((None, 2), ('float16', 1))


class InjectedError(Exception):
    """Raised by a test in the middle of a step."""


class Injected(CountingNet):
    """Fails where it is told to: in one of its forward passes, or in the backward pass of one.

    ``passes`` counts those of a step; a forward without gradients (ESAM's selection) is 'selecting'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.fault: tuple[str, str] | None = None
        self.passes: list[None] = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        if torch.is_grad_enabled():
            self.passes.append(None)
        stage = 'selecting' if not torch.is_grad_enabled() else ('first', 'second')[len(self.passes) - 1]
        losses = super().forward(inputs, targets, sample_idx, mode)
        if self.fault == (stage, 'forward'):
            fail()
        if self.fault == (stage, 'backward'):
            losses['loss_size'].register_hook(fail)
        return losses


def fail(*_: Any, **__: Any) -> Any:
    raise InjectedError


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
    """Have ``owner.name`` fail the next time it is called: before it does anything, or after it has done everything."""
    original = getattr(owner, name)
    calls: list[None] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        result = original(*args, **kwargs) if after or len(calls) > 1 else None
        return fail() if len(calls) == 1 else result

    monkeypatch.setattr(owner, name, failing)


def in_model(stage: str, what: str) -> Callable[[pytest.MonkeyPatch, Injected, TwoPassOptimWrapper], None]:
    return lambda monkeypatch, model, wrapper: setattr(model, 'fault', (stage, what))


def in_call(
    owner: Any, name: str, **kwargs: Any
) -> Callable[[pytest.MonkeyPatch, Injected, TwoPassOptimWrapper], None]:
    return lambda monkeypatch, model, wrapper: once(monkeypatch, owner, name, **kwargs)


POINTS: dict[str, Callable[[pytest.MonkeyPatch, Injected, TwoPassOptimWrapper], None]] = {
    'copy of the state': in_call(TensorBackup, 'save', after=True),
    'first forward': in_model('first', 'forward'),
    'end of the first forward': in_call(ascent.Ascent, 'unfreeze'),
    'stash of accumulated gradients': in_call(GradientStash, 'stash', after=True),
    'first backward': in_model('first', 'backward'),
    'copy of the weights': in_call(TensorBackup, 'save'),
    'perturbation, before it': in_call(ascent, 'perturb_'),
    'perturbation, after it': in_call(ascent, 'perturb_', after=True),
    'second pass, gradients of earlier micro-batches': in_call(GradientStash, 'unstash', after=True),
    'replay of the call': in_call(ModelCall, 'replay'),
    'forward that selects': in_model('selecting', 'forward'),
    'second forward': in_model('second', 'forward'),
    'second backward': in_model('second', 'backward'),
    'restoring the weights, before it': in_call(TensorBackup, 'restore'),
    'restoring the weights, after it': in_call(TensorBackup, 'restore', after=True),
    'restoring buffers': in_call(ModuleStateBackup, 'restore'),
    'clipping': lambda monkeypatch, model, wrapper: once(monkeypatch, wrapper, '_clip_grad', after=True),
    'step of the loss scaler': in_call(Precision, 'step'),
    'step of the optimizer': lambda monkeypatch, model, wrapper: once(monkeypatch, wrapper.optimizer, 'step'),
    'history update': in_call(SampleHistory, 'update'),
    'reading the ids': in_call(PerSampleOptimWrapper, 'keys'),
}
# Where a step of a method does not come by.
ABSENT = {
    'forward that selects': lambda name: not name.startswith('esam'),
    'history update': lambda name: not name.startswith(('ausam', 'esam-history')),
    'reading the ids': lambda name: not name.startswith(('ausam', 'esam-history')),
}


def snapshot(model: nn.Module, wrapper: TwoPassOptimWrapper) -> dict[str, Any]:
    """Everything that a step can change."""
    state = wrapper.state_dict()
    if isinstance(wrapper, PerSampleOptimWrapper):
        # The step begins by writing what the one before has measured into the history: the same in either place.
        visits = copy.deepcopy(wrapper.pending_updates)
        visits.flush()
        state['mm_sharp'].update(history=visits.history.state_dict(), visits={})
    found = copy.deepcopy({
        'weights': {name: parameter.detach() for name, parameter in model.named_parameters()},
        'buffers': dict(model.named_buffers()),
        'numbers': getattr(model, 'calls', 0),
        'optimizer': state,
        'gradients': [parameter.grad for parameter in model.parameters()],
        'requires_grad': [parameter.requires_grad for parameter in model.parameters()],
        'hooks': [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        'micro-batches': wrapper.inner_count,
        'scaler': [] if wrapper.precision.scaler is None else [*wrapper.precision.scaler._per_optimizer_states],
        'last step': wrapper.last_step and wrapper.last_step.loss,
    })  # fmt: skip
    # Copies already; thousands of numbers.
    return {**found, 'random state': [torch.get_rng_state(), *np.random.get_state(), hash(random.getstate())]}


def same(left: Any, right: Any) -> bool:
    """Whether two snapshots, or parts of them, are equal bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def step(model: Injected, wrapper: TwoPassOptimWrapper, batch: Batch) -> None:
    model.passes.clear()
    model.train_step(batch, wrapper)


Prepared = tuple[Injected, TwoPassOptimWrapper, Batch]


def prepare(name: str, refreshes: bool, dtype: str | None, accumulation: int) -> Prepared:
    """A model after one micro-batch, and the batch of the second, which ends a cycle."""
    model = make(Injected)
    # No overflow, at which the scaler would leave the optimizer's step out.
    options: dict[str, Any] = dict(loss_scale=256.0, clip_grad=dict(max_norm=10.0))
    options |= dict(refresh=1) if refreshes else {}
    wrapper = build(name, model, dtype=dtype, accumulative_counts=accumulation, **options)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    first, batch = batches(2)
    step(model, wrapper, first)
    return model, wrapper, batch


@functools.cache
def never_failed(
    name: str, refreshes: bool, dtype: str | None, accumulation: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Snapshots of a run without a fault: after :func:`prepare`, and after the step that follows."""
    model, wrapper, batch = prepare(name, refreshes, dtype, accumulation)
    before = snapshot(model, wrapper)
    step(model, wrapper, batch)
    return before, snapshot(model, wrapper)


PAIRS = [(point, name) for point in POINTS for name in METHODS if not (point in ABSENT and ABSENT[point](name))]


@pytest.mark.parametrize(('point', 'name'), PAIRS)
def test_a_fault_leaves_everything_as_it_was(
    name: str, point: str, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    for dtype, accumulation in SETTINGS:
        check(name, point, dtype, accumulation, monkeypatch)
    holds('Faults in a step', point, name, HELD, count=len(SETTINGS))


def check(name: str, point: str, dtype: str | None, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at ``point``; compare with the state before, and the next step with that of a run that never failed."""
    refreshes = (name, point) == ('esam-history', 'forward that selects')
    expected, next_step = never_failed(name, refreshes, dtype, accumulation)
    model, wrapper, batch = prepare(name, refreshes, dtype, accumulation)
    before = snapshot(model, wrapper)
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    with monkeypatch.context() as patch:
        POINTS[point](patch, model, wrapper)
        with pytest.raises(InjectedError):
            step(model, wrapper, batch)
        model.fault = None
    after = snapshot(model, wrapper)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert same(before, expected)
    step(model, wrapper, batch)
    assert same(next_step, snapshot(model, wrapper))


CHECKPOINTS = [(point, name) for point in ('random state', 'history') for name in METHODS]
CHECKPOINTS.remove(('history', 'sam'))  # it has none


@pytest.mark.parametrize(('point', 'name'), CHECKPOINTS)
def test_a_fault_while_a_checkpoint_is_made(
    name: str, point: str, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    _, next_step = never_failed(name, False, None, 1)
    model, wrapper, batch = prepare(name, False, None, 1)
    before = snapshot(model, wrapper)
    with monkeypatch.context() as patch:
        once(patch, *((RandomState, 'capture') if point == 'random state' else (SampleHistory, 'state_dict')))
        with pytest.raises(InjectedError):
            wrapper.state_dict()
    assert same(before, snapshot(model, wrapper))
    step(model, wrapper, batch)
    assert same(next_step, snapshot(model, wrapper))
    holds('Faults in a step', 'checkpoint', name, HELD)
