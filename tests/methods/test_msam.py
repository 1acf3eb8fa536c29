"""Momentum SAM's perturbation is there in its two passes, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from mm_sharp import MSAMOptimWrapper
from mm_sharp.errors import UsageError
from tests.memory_toys import MEMORIES
from tests.references_family import flat
from tests.toys import Batch, Notes, ToyNet, batches, make, same_state, toy_config
from tests.wrappers import build, momentum_sgd, resting_sgd


class Watched(ToyNet):
    """Notes its weights in the forward and in the backward pass, and fails in one of them, counted from 0."""

    def __init__(self, fails_in: str = '', at: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fails_in, self.at = fails_in, at
        self.forwards, self.backwards = Notes(), Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        if mode == 'loss' and torch.is_grad_enabled():
            self.forwards.append(flat(list(self.parameters())))
            self.fail('forward', len(self.forwards))
            losses['loss_square'].register_hook(self.going_back)
        return losses

    def going_back(self, _: Tensor) -> None:
        self.backwards.append(flat(list(self.parameters())))
        self.fail('backward', len(self.backwards))

    def fail(self, where: str, count: int) -> None:
        if self.fails_in == where and count - 1 == self.at:
            raise ArithmeticError(where)


@OPTIMIZERS.register_module(force=True)
class OwnSGD(SGD):
    """An optimizer of a user's."""


@OPTIMIZERS.register_module(force=True)
class OwnAdam(Adam):
    """A user's that takes a whole model's weights alone."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        params = list(params)
        if len(params) == 1:
            raise ValueError('a single weight')
        super().__init__(params, **kwargs)


def flat_weights(model: nn.Module) -> Tensor:
    return flat(list(model.parameters()))


def after_one_step(**kwargs: Any) -> tuple[Watched, MSAMOptimWrapper, list[Batch]]:
    model: Any = make(Watched, **kwargs)
    wrapper: Any = build('msam', model)
    first, *others = batches(4)
    model.train_step(first, wrapper)
    return model, wrapper, others


@pytest.mark.parametrize('with_cp', [False, True])
def test_both_passes_are_at_the_same_distance_down_the_momentum(with_cp: bool) -> None:
    model, wrapper, (batch, *_) = after_one_step(with_cp=with_cp)
    weights = flat_weights(model)
    momentum = flat([wrapper.optimizer.state[p]['momentum_buffer'] for p in model.parameters()])
    model.train_step(batch, wrapper)
    forward, backward = model.forwards[-1], model.backwards[-1]
    assert torch.equal(forward, backward)
    torch.testing.assert_close(forward, weights - 0.3 * momentum / momentum.norm())


def test_between_the_passes_and_after_them_the_weights_are_bit_for_bit_as_they_were() -> None:
    model, wrapper, (batch, *_) = after_one_step()
    weights, pointers = flat_weights(model), [p.data_ptr() for p in model.parameters()]
    wrapper.optimizer.register_step_pre_hook(lambda *_: seen.append(flat_weights(model)))
    seen: list[Tensor] = []
    with wrapper.optim_context(model):
        losses = model(**batch)
    assert torch.equal(flat_weights(model), weights)
    wrapper.update_params(model.parse_losses(losses)[0])
    assert torch.equal(seen[0], weights)
    assert not torch.equal(model.forwards[-1], weights)
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize(('where', 'error'), [('forward', 1), ('backward', 1)])
@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_an_error_leaves_nothing_perturbed(where: str, error: int, accumulative_counts: int) -> None:
    """The step can be tried again, and is then that of a run without an error."""
    model: Any = make(Watched, fails_in=where, at=error * accumulative_counts)
    other: Any = make(Watched)
    wrappers = [build('msam', each, accumulative_counts=accumulative_counts) for each in (model, other)]
    *first, last = batches(accumulative_counts + 1)
    for batch in first:
        model.train_step(batch, wrappers[0])
        other.train_step(batch, wrappers[1])
    weights = flat_weights(model)
    with pytest.raises(ArithmeticError, match=where):
        model.train_step(last, wrappers[0])
    assert torch.equal(flat_weights(model), weights)
    assert same_state(model, other)
    model.train_step(last, wrappers[0])
    other.train_step(last, wrappers[1])
    assert same_state(model, other)


def test_a_forward_left_without_its_update_is_forgotten() -> None:
    """Also where the weights were written to since, as by a checkpoint that is loaded."""
    model, wrapper, (left, batch, _) = after_one_step()
    with wrapper.optim_context(model):
        model(**left)
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    weights = flat_weights(model)
    with wrapper.optim_context(model):
        losses = model(**batch)
    assert torch.equal(flat_weights(model), weights)
    wrapper.update_params(model.parse_losses(losses)[0])


def test_a_model_that_calls_itself_again_after_an_error() -> None:
    model, wrapper, (batch, *_) = after_one_step()
    model.fails_in, model.at = 'forward', 1
    weights = flat_weights(model)
    with wrapper.optim_context(model):
        with pytest.raises(ArithmeticError):
            model(**batch)
        losses = model(**batch)
    assert torch.equal(model.forwards[1], model.forwards[2])
    assert torch.equal(flat_weights(model), weights)
    wrapper.update_params(model.parse_losses(losses)[0])


@pytest.mark.parametrize('kind', ['Codebook', 'Flat'])
def test_memory_shared_with_weights_is_restored_after_an_error(kind: str) -> None:
    model: Any = make(MEMORIES[kind])
    wrapper = build('msam', model, resting_sgd(model))
    first, second = batches(2)
    model.train_step(first, wrapper)
    weights = flat_weights(model)
    handle = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.train_step(second, wrapper)
    handle.remove()
    assert torch.equal(flat_weights(model), weights)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_an_enclosing_autocast_region_keeps_no_stale_casts(dtype: str) -> None:
    inside, outside = make(), make()
    wrappers = [build('msam', model, dtype=dtype) for model in (inside, outside)]
    for batch in batches(4):
        with torch.autocast('cpu', dtype=getattr(torch, dtype)):
            inside(**batch, mode='tensor')  # fills the cache with casts of w
            with wrappers[0].optim_context(inside):
                losses = inside(**batch)
            wrappers[0].update_params(inside.parse_losses(losses)[0])
        with torch.autocast('cpu', dtype=getattr(torch, dtype)):
            outside(**batch, mode='tensor')
        outside.train_step(batch, wrappers[1])
    assert same_state(inside, outside)


def test_what_has_no_momentum_yet_stays() -> None:
    """A layer that was frozen in the first step."""
    model, wrapper, (batch, *_) = after_one_step()
    del wrapper.optimizer.state[model.head.weight]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    model.train_step(batch, wrapper)
    start = 0
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        seen = model.forwards[-1][start : start + weight.numel()].view_as(weight)
        assert torch.equal(seen, weight) == (parameter is model.head.weight)
        start += weight.numel()


def test_the_first_step_is_the_base_optimizer_s() -> None:
    ours, theirs = make(), make()
    wrapper, base = build('msam', ours), OptimWrapper(momentum_sgd(theirs))
    first, second = batches(2)
    ours.train_step(first, wrapper)
    theirs.train_step(first, base)
    assert same_state(ours, theirs)
    ours.train_step(second, wrapper)
    theirs.train_step(second, base)
    assert not same_state(ours, theirs)


@pytest.mark.parametrize('kind', [SGD, RMSprop, Adagrad])
def test_an_optimizer_without_momentum_is_refused(kind: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match=rf'MSAMOptimWrapper: optimizer={kind.__name__} .*no momentum.*momentum=0.9'):
        MSAMOptimWrapper(kind(make().parameters(), lr=0.1))  # type: ignore[call-arg]


@pytest.mark.parametrize('kind', [Adam, AdamW])
def test_optimizers_with_momentum(kind: type[Optimizer]) -> None:
    model: Any = make(Watched)
    wrapper = MSAMOptimWrapper(kind(model.parameters(), lr=0.0))  # type: ignore[call-arg]
    for batch in batches(2):
        model.train_step(batch, wrapper)
    distance = (model.forwards[1] - model.forwards[0]).norm().item()
    assert distance == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize(
    'optimizer', [dict(type='OwnSGD', lr=0.01, momentum=0.9), dict(type='OwnAdam', lr=0.01)], ids=lambda o: o['type']
)
def test_a_runner_takes_a_user_s_optimizer_with_momentum(optimizer: dict[str, Any], tmp_path: Path) -> None:
    wrapper = dict(type='MSAMOptimWrapper', optimizer=optimizer)
    runner = Runner.from_cfg(toy_config(tmp_path, optim_wrapper=wrapper))
    runner.train()
    assert type(runner.optim_wrapper.optimizer).__name__ == optimizer['type']


def test_a_runner_refuses_a_user_s_optimizer_without_momentum(tmp_path: Path) -> None:
    wrapper = dict(type='MSAMOptimWrapper', optimizer=dict(type='OwnSGD', lr=0.01))
    runner = Runner.from_cfg(toy_config(tmp_path, optim_wrapper=wrapper))
    with pytest.raises(UsageError, match=r'optimizer=OwnSGD is not allowed: it has no momentum.*momentum=0.9'):
        runner.train()


def test_quantized_weights_cannot_be_perturbed() -> None:
    with pytest.raises(ValueError, match=r'MSAMOptimWrapper: perturb_quantized=True is not allowed.*before'):
        build('msam', make(), perturb_quantized=True)
