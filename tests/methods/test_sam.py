"""SAM and ASAM equal hand-written references, bit for bit on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mm_sharp import SAMOptimWrapper
from tests.references import sam_gradients, sam_step
from tests.toys import Batch, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import momentum_sgd


def loss_function(model: ToyNet, batch: Batch) -> Callable[[], torch.Tensor]:
    return lambda: model.parse_losses(model(**batch))[0]


@pytest.mark.parametrize(('rho', 'adaptive'), [(0.05, False), (0.5, True)], ids=['sam', 'asam'])
def test_fifty_steps_equal_the_reference_bit_for_bit(rho: float, adaptive: bool) -> None:
    ours, theirs = make(), make()
    wrapper = SAMOptimWrapper(momentum_sgd(ours), rho=rho, adaptive=adaptive)
    optimizer = momentum_sgd(theirs)
    start = make()
    for batch in batches(50):
        ours.train_step(batch, wrapper)
        sam_step(theirs, optimizer, loss_function(theirs, batch), rho, adaptive)
        assert same_state(ours, theirs)
    assert not same_state(ours, start)
    assert ours.norm.num_batches_tracked.item() == 50
    momenta = [optimizer.state[p]['momentum_buffer'] for p in theirs.parameters()]
    own = [wrapper.optimizer.state[p]['momentum_buffer'] for p in ours.parameters()]
    assert all(same_bits(left, right) for left, right in zip(own, momenta, strict=True))


@pytest.mark.parametrize('adaptive', ['tensor', 'layer', 'global'])
def test_fifty_steps_relative_to_the_weights_equal_the_reference(adaptive: str) -> None:
    ours, theirs, start = make(), make(), make()
    wrapper = SAMOptimWrapper(momentum_sgd(ours), rho=0.02, adaptive=adaptive)
    optimizer = momentum_sgd(theirs)
    for batch in batches(50):
        ours.train_step(batch, wrapper)
        sam_step(theirs, optimizer, loss_function(theirs, batch), 0.02, adaptive)
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert not same_state(ours, start)


def test_the_reference_differs_from_the_base_optimizer() -> None:
    """The comparison above could not fail if the perturbation had no effect."""
    sam, base = make(), make()
    sam_optimizer, base_optimizer = momentum_sgd(sam), momentum_sgd(base)
    for batch in batches(3):
        sam_step(sam, sam_optimizer, loss_function(sam, batch), 0.05)
        loss_function(base, batch)().backward()
        base_optimizer.step()
        base_optimizer.zero_grad()
    assert not same_state(sam, base)


@pytest.mark.parametrize('optimizer', [Adam, AdamW])
def test_any_base_optimizer(optimizer: type[Optimizer]) -> None:
    ours, theirs = make(), make()
    wrapper = SAMOptimWrapper(optimizer(ours.parameters(), lr=1e-3), rho=0.1)
    reference = optimizer(theirs.parameters(), lr=1e-3)
    for batch in batches(5):
        ours.train_step(batch, wrapper)
        sam_step(theirs, reference, loss_function(theirs, batch), 0.1)
    assert same_state(ours, theirs)


def test_the_record_holds_both_losses_and_the_norm() -> None:
    ours, theirs = make(), make()
    wrapper = SAMOptimWrapper(momentum_sgd(ours), rho=0.05)
    (batch,) = batches(1)
    ours.train_step(batch, wrapper)
    loss = loss_function(theirs, batch)()
    gradients = torch.autograd.grad(loss, list(theirs.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    weights = [p.detach().clone() for p in theirs.parameters()]
    with torch.no_grad():
        for parameter, weight, gradient in zip(theirs.parameters(), weights, gradients, strict=True):
            parameter.copy_(weight + 0.05 * gradient / norm)
        perturbed = loss_function(theirs, batch)()
    record = wrapper.last_step
    assert record is not None
    assert record.loss.item() == loss.item()
    assert record.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert record.perturbed_loss.item() == pytest.approx(perturbed.item(), rel=1e-5)
    assert not record.loss.requires_grad
    assert not record.perturbed_loss.requires_grad


def test_accumulation_perturbs_each_micro_batch_by_its_own_gradient() -> None:
    ours, theirs = make(), make()
    wrapper = SAMOptimWrapper(momentum_sgd(ours), rho=0.05, accumulative_counts=3)
    optimizer = momentum_sgd(theirs)
    cycle = batches(3)
    for batch in cycle:
        ours.train_step(batch, wrapper)
    final = [sam_gradients(theirs, loss_function(theirs, batch), 0.05) for batch in cycle]
    for parameter, *parts in zip(theirs.parameters(), *final, strict=True):
        parameter.grad = sum(parts) / 3
    optimizer.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_clipping_acts_on_the_final_gradient_only() -> None:
    ours, theirs = make(), make()
    wrapper = SAMOptimWrapper(SGD(ours.parameters(), lr=1.0), rho=0.05, clip_grad=dict(max_norm=0.1))
    optimizer = SGD(theirs.parameters(), lr=1.0)
    (batch,) = batches(1)
    ours.train_step(batch, wrapper)
    # Had the first gradient been clipped, the recorded norm would be at most 0.1.
    assert wrapper.last_step is not None
    assert wrapper.last_step.grad_norm.item() > 0.2
    final = sam_gradients(theirs, loss_function(theirs, batch), 0.05)
    norm = torch.cat([g.flatten() for g in final]).norm()
    for parameter, gradient in zip(theirs.parameters(), final, strict=True):
        parameter.grad = gradient * (0.1 / norm)
    optimizer.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


PERTURB: dict[str, tuple[Any, set[str]]] = {
    'all': ('all', {'conv.weight', 'conv.bias', 'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}),
    'auto': ('auto', {'conv.weight', 'conv.bias', 'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}),
    'weights': ('weights', {'conv.weight', 'head.weight'}),
    'no norm': (dict(norm=False), {'conv.weight', 'conv.bias', 'head.weight', 'head.bias'}),
    'no bias': (dict(bias=False), {'conv.weight', 'norm.weight', 'norm.bias', 'head.weight'}),
    'include': (dict(include='^head'), {'head.weight', 'head.bias'}),
    'exclude': (dict(exclude=['^head', 'norm']), {'conv.weight', 'conv.bias'}),
}


@pytest.mark.parametrize('case', PERTURB)
def test_perturb_moves_only_what_it_names_and_trains_everything(case: str) -> None:
    perturb, expected = PERTURB[case]
    model = make()
    model.norm.eval()  # on batch statistics, the bias before BatchNorm would have no gradient
    wrapper = SAMOptimWrapper(momentum_sgd(model), rho=0.05, perturb=perturb)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: list[set[str]] = []

    def watch(module: nn.Module, *_: Any) -> None:
        moved.append({n for n, p in module.named_parameters() if not torch.equal(p, before[n])})

    model.register_forward_pre_hook(watch)
    model.train_step(batches(1)[0], wrapper)
    assert moved == [set(), expected]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
