"""LookSAM equals a hand-written reference, and its kept direction is state."""

from __future__ import annotations

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from mm_sharp import LookSAMOptimWrapper, SAMOptimWrapper
from tests.checkpoints import through_disk
from tests.references import gradients_of, sam_perturbation
from tests.toys import Batch, ToyNet, batches, make, same_state
from tests.wrappers import momentum_sgd


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Reference:
    """Algorithm 1 on flat vectors; micro-batches are averaged before anything else is done with their gradients."""

    def __init__(self, model: ToyNet, optimizer: Optimizer, k: int, alpha: float, rho: float = 0.05) -> None:
        self.model, self.optimizer, self.k, self.alpha, self.rho = model, optimizer, k, alpha, rho
        self.steps, self.kept = 0, torch.zeros(())

    def loss(self, batch: Batch) -> Tensor:
        total: Tensor = self.model.parse_losses(self.model(**batch))[0]
        return total

    def gradient(self, micro_batches: list[Batch], perturbed: bool) -> Tensor:
        parameters, parts = list(self.model.parameters()), []
        for batch in micro_batches:
            weights = [parameter.detach().clone() for parameter in parameters]
            if perturbed:
                moves = sam_perturbation(gradients_of(self.loss(batch), parameters), self.rho)
                self.write([w + e for w, e in zip(weights, moves, strict=True)])
            parts.append(flat(gradients_of(self.loss(batch), parameters)))
            self.write(weights)
        return torch.stack(parts).mean(0)

    def write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), values, strict=True):
                parameter.copy_(value)

    def step(self, micro_batches: list[Batch]) -> None:
        plain = self.gradient(micro_batches, perturbed=False)
        if self.steps % self.k == 0:
            final = self.gradient(micro_batches, perturbed=True)
            self.kept = final - (final @ plain) / (plain @ plain) * plain
        else:
            final = plain + self.alpha * plain.norm() / self.kept.norm() * self.kept
        start = 0
        for parameter in self.model.parameters():
            parameter.grad = final[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.optimizer.step()
        self.steps += 1


@pytest.mark.parametrize(('k', 'alpha', 'accumulative_counts'), [(5, 0.7, 1), (3, 0.3, 2)])
def test_fifty_steps_equal_the_reference(k: int, alpha: float, accumulative_counts: int) -> None:
    ours, theirs = make(norm=False).double(), make(norm=False).double()
    wrapper = LookSAMOptimWrapper(momentum_sgd(ours), k=k, alpha=alpha, accumulative_counts=accumulative_counts)
    reference = Reference(theirs, momentum_sgd(theirs), k, alpha)
    data = [
        {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        for batch in batches(50 * accumulative_counts)
    ]
    for number in range(50):
        micro_batches = data[number * accumulative_counts : (number + 1) * accumulative_counts]
        for batch in micro_batches:
            ours.train_step(batch, wrapper)
        reference.step(micro_batches)
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
        assert (wrapper.last_step.perturbed_loss is None) == (number % k > 0)


def test_every_step_is_sam_s_with_k_of_one() -> None:
    ours, theirs = make(), make()
    wrapper, sam = LookSAMOptimWrapper(momentum_sgd(ours), k=1), SAMOptimWrapper(momentum_sgd(theirs))
    for batch in batches(5):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, sam)
    assert same_state(ours, theirs)


def test_without_weight_the_steps_between_are_the_base_optimizer_s() -> None:
    ours, theirs = make(), make()
    wrapper, base = LookSAMOptimWrapper(momentum_sgd(ours), k=100, alpha=0.0), OptimWrapper(momentum_sgd(theirs))
    first, *others = batches(4)
    ours.train_step(first, wrapper)
    theirs.load_state_dict(ours.state_dict())
    base.load_state_dict(through_disk(wrapper.state_dict()))
    for batch in others:
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base)
    assert same_state(ours, theirs)


@pytest.mark.parametrize('optimizer', [momentum_sgd, SGD, Adam])
@pytest.mark.parametrize('dtype', [None, 'float16'])
def test_the_kept_direction_goes_on_after_a_resume(optimizer: type[Optimizer], dtype: str | None) -> None:
    def build(model: ToyNet) -> LookSAMOptimWrapper:
        base = momentum_sgd(model) if optimizer is momentum_sgd else optimizer(model.parameters(), lr=1e-2)
        return LookSAMOptimWrapper(base, k=4, dtype=dtype, **({'loss_scale': 64.0} if dtype else {}))

    whole, resumed = make(), make()
    wrapper, data = build(whole), batches(7)
    for batch in data[:2]:
        whole.train_step(batch, wrapper)
    resumed.load_state_dict(whole.state_dict())
    second = build(resumed)
    second.load_state_dict(through_disk(wrapper.state_dict()))
    second.initialize_count_status(resumed, 2, 7)
    for batch in data[2:]:
        whole.train_step(batch, wrapper)
        resumed.train_step(batch, second)
    assert same_state(whole, resumed)
    assert len(second.kept) == len(list(resumed.parameters()))


def test_a_checkpoint_loads_into_a_plain_wrapper() -> None:
    model = make()
    wrapper = LookSAMOptimWrapper(Adam(model.parameters()), k=2)
    first, second = batches(2)
    model.train_step(first, wrapper)
    plain = OptimWrapper(Adam(model.parameters()))
    plain.load_state_dict(wrapper.state_dict())
    model.train_step(second, plain)


def test_an_overflow_leaves_the_kept_direction() -> None:
    model = make(norm=False)
    wrapper = LookSAMOptimWrapper(momentum_sgd(model), k=1, dtype='float16', loss_scale=dict(init_scale=64.0))
    good, bad = batches(2)
    model.train_step(good, wrapper)
    before = [tensor.clone() for tensor in wrapper.kept.values()]
    bad['inputs'][0] = 6e4
    model.train_step(bad, wrapper)
    assert all(map(torch.equal, wrapper.kept.values(), before))


@pytest.mark.parametrize(('name', 'value'), [('k', 0), ('k', 2.5), ('alpha', -0.1), ('alpha', None), ('rho', -1)])
def test_arguments_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf'LookSAMOptimWrapper: {name}={value!r} is not allowed'):
        LookSAMOptimWrapper(momentum_sgd(make()), **{name: value})  # type: ignore[arg-type]
