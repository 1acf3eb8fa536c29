"""The family with parameters that come and go, that are sparse or complex, and with several learning rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, build_optim_wrapper
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp.methods.gsam import GSAMOptimWrapper
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.checkpoints import through_disk
from tests.wrappers import build

FAMILY = ('sam', 'looksam', 'friendlysam', 'gsam', 'wsam', 'wsam-coupled', 'msam')


def step(wrapper: TwoPassOptimWrapper, model: nn.Module, *args: Any) -> None:
    with wrapper.optim_context(model):
        loss = model(*args)
    wrapper.update_params(loss)


# ---------------------------------------------------------------- parameters without a gradient
class Heads(nn.Module):
    """One head at a time: the other one has no gradient in that step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        loss: Tensor = self.heads[head](self.trunk(inputs)).square().mean()
        return loss


class ByHand:
    """A hand-written step: a parameter without a gradient has one of zero, and does not move."""

    def __init__(self, model: Heads, rho: float, lr: float) -> None:
        self.model, self.rho, self.lr = model, rho, lr
        self.parameters = list(model.parameters())
        self.kept = [torch.zeros_like(parameter) for parameter in self.parameters]

    def gradient(self, *args: Any) -> list[Tensor | None]:
        return list(torch.autograd.grad(self.model(*args), self.parameters, allow_unused=True))

    def gradient_beside(self, along: list[Tensor | None], *args: Any) -> list[Tensor | None]:
        norm = torch.cat([v.flatten() for v in along if v is not None]).norm()
        moves = [
            torch.zeros_like(p) if v is None else self.rho * v / norm
            for p, v in zip(self.parameters, along, strict=True)
        ]
        before = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, move in zip(self.parameters, moves, strict=True):
                parameter += move
        found = self.gradient(*args)
        with torch.no_grad():
            for parameter, was in zip(self.parameters, before, strict=True):
                parameter.copy_(was)
        return found

    def descend(self, gradients: list[Tensor | None]) -> None:
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= self.lr * gradient


def friendly_step(hand: ByHand, *args: Any) -> None:
    g = hand.gradient(*args)
    for number, gradient in enumerate(g):
        hand.kept[number] = 0.9 * hand.kept[number] + 0.1 * (0.0 if gradient is None else gradient)
    hand.descend(hand.gradient_beside([None if v is None else v - m for v, m in zip(g, hand.kept, strict=True)], *args))


def look_step(hand: ByHand, number: int, *args: Any) -> None:
    """k = 3, alpha = 0.7."""
    g = hand.gradient(*args)
    if number % 3 == 0:
        second = hand.gradient_beside(g, *args)
        pairs = [(a, b) for a, b in zip(second, g, strict=True) if a is not None and b is not None]
        along = sum((a * b).sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        zero = [torch.zeros_like(parameter) for parameter in hand.parameters]
        hand.kept = [z if a is None or b is None else a - along * b for a, b, z in zip(second, g, zero, strict=True)]
        hand.descend(second)
        return
    norm = torch.cat([v.flatten() for v in g if v is not None]).norm()
    factor = 0.7 * norm / torch.cat([v.flatten() for v in hand.kept]).norm()
    hand.descend([None if v is None else v + factor * k for v, k in zip(g, hand.kept, strict=True)])


@pytest.mark.parametrize('name', ['friendlysam', 'looksam'])
def test_what_is_kept_of_a_parameter_without_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    ours = Heads().double()
    hand = ByHand(copy.deepcopy(ours), rho=0.1, lr=0.05)
    options = {'sigma': 1.0, 'lmbda': 0.9} if name == 'friendlysam' else {'k': 3, 'alpha': 0.7}
    wrapper = build(name, ours, SGD(ours.parameters(), lr=0.05), rho=0.1, **options)
    for number, head in enumerate([0, 1, 0, 1, 1, 0, 0, 0, 1]):
        args = torch.randn(4, 3, dtype=torch.double), head
        step(wrapper, ours, *args)
        friendly_step(hand, *args) if name == 'friendlysam' else look_step(hand, number, *args)
        for left, right in zip(ours.parameters(), hand.parameters, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
        for parameter, kept in zip(ours.parameters(), hand.kept, strict=True):
            found = wrapper.kept.get(parameter, torch.zeros_like(parameter))
            torch.testing.assert_close(found, kept, rtol=1e-9, atol=1e-12)


def test_what_is_kept_stays_where_a_step_is_not_finite() -> None:
    """Of parameters without a gradient in that step, too."""
    model = Heads()
    wrapper = build('friendlysam', model, SGD(model.parameters(), lr=0.05))
    step(wrapper, model, torch.ones(4, 3), 0)
    before = {parameter: kept.clone() for parameter, kept in wrapper.kept.items()}
    step(wrapper, model, torch.full((4, 3), torch.nan), 1)
    assert all(torch.equal(wrapper.kept[parameter], kept) for parameter, kept in before.items())


# ---------------------------------------------------------------- sparse gradients
class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 1)

    def forward(self, words: Tensor) -> Tensor:
        loss: Tensor = (self.head(self.table(words)) - 1.0).square().mean()
        return loss


@pytest.mark.parametrize('name', FAMILY)
def test_layers_of_sparse_gradients_can_be_left_out(name: str) -> None:
    """They get the base optimizer's step along the last pass's gradient; all else is as without them."""
    torch.manual_seed(0)
    model = Words(sparse=True)
    wrapper = build(name, model, SGD(model.parameters(), lr=0.1, momentum=0.9), perturb=dict(exclude=['^table']))
    before = copy.deepcopy(model.state_dict())
    for _ in range(6):
        step(wrapper, model, torch.tensor([0, 2, 2]))
    after = model.state_dict()
    assert not torch.equal(after['table.weight'][[0, 2]], before['table.weight'][[0, 2]])
    assert torch.equal(after['table.weight'][[1, 3, 4]], before['table.weight'][[1, 3, 4]])
    assert not torch.equal(after['head.weight'], before['head.weight'])


@pytest.mark.parametrize('name', FAMILY)
def test_otherwise_they_are_refused_by_name(name: str) -> None:
    model = Words(sparse=True)
    wrapper = build(name, model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    words = torch.tensor([0, 2, 2])
    if name == 'msam':  # in the first step there is no momentum
        step(wrapper, model, words)
    with pytest.raises(NotImplementedError, match=r"\['table.weight'\] are sparse"):
        step(wrapper, model, words)


# ---------------------------------------------------------------- complex parameters
class Filter(nn.Module):
    """The same function of complex numbers, or of pairs of real ones."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.real = nn.Parameter(weight), nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        spectrum = torch.view_as_real(inputs.to(weight.dtype) @ weight)
        return spectrum.square().sum(-1).mean() + (inputs @ self.real - 1).square().mean()


@pytest.mark.parametrize('name', FAMILY)
def test_a_complex_parameter_is_two_real_ones(name: str) -> None:
    torch.manual_seed(0)
    pairs = torch.randn(3, 2, 2, dtype=torch.double)
    models = Filter(torch.view_as_complex(pairs.clone())), Filter(pairs.clone())
    models[0].real.data, models[1].real.data = torch.ones(3).double(), torch.ones(3).double()
    wrappers = [build(name, m, SGD(m.parameters(), lr=0.05, momentum=0.9), rho=0.2) for m in models]
    for _ in range(6):
        batch = torch.randn(5, 3, dtype=torch.double)
        for model, wrapper in zip(models, wrappers, strict=True):
            step(wrapper, model, batch)
    torch.testing.assert_close(torch.view_as_real(models[0].weight), models[1].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(models[0].real, models[1].real, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- GSAM's learning rate
def gsam(model: nn.Module, multiplier: float = 1.0, **options: Any) -> GSAMOptimWrapper:
    """Of the trunk the learning rate is multiplied."""
    config = dict(
        type='GSAMOptimWrapper',
        rho=0.1,
        optimizer=dict(type='SGD', lr=0.1),
        paramwise_cfg=dict(custom_keys=dict(trunk=dict(lr_mult=multiplier))),
        **options,
    )
    wrapper: GSAMOptimWrapper = build_optim_wrapper(model, config)
    return wrapper


@pytest.mark.parametrize('multiplier', [0.0, 0.01, 3.0])
@pytest.mark.parametrize('options', [{}, {'lr_max': 0.1}, {'lr_max': 0.2, 'rho_min': 0.02, 'lr_min': 0.01}])
def test_gsams_radius_follows_the_configs_learning_rate(multiplier: float, options: dict[str, float]) -> None:
    model = Heads()
    wrapper = gsam(model, multiplier, **options)
    scheduler = CosineAnnealingLR(wrapper, T_max=5, by_epoch=False)
    highest, low, least = options.get('lr_max', 0.1), options.get('lr_min', 0.0), options.get('rho_min', 0.0)
    for _ in range(4):
        lr = wrapper.base_param_settings['lr']
        expected = least + (0.1 - least) * min(max((lr - low) / (highest - low), 0.0), 1.0)
        step(wrapper, model, torch.ones(4, 3), 0)
        assert wrapper.scheduled_rho == pytest.approx(expected)
        scheduler.step()


def test_gsams_highest_learning_rate_is_that_at_the_start() -> None:
    """A Runner scales learning rates after it has built the wrapper; a resumed run goes on with the same."""
    model = Heads()
    wrapper = gsam(model)
    for group in wrapper.optimizer.param_groups:
        group['lr'] /= 8
    wrapper.initialize_count_status(model, 0, 4)
    step(wrapper, model, torch.ones(4, 3), 0)
    assert wrapper.scheduled_rho == pytest.approx(0.1)
    for group in wrapper.optimizer.param_groups:
        group['lr'] /= 2
    step(wrapper, model, torch.ones(4, 3), 0)
    assert wrapper.scheduled_rho == pytest.approx(0.05)
    resumed = gsam(model)
    resumed.load_state_dict(through_disk(wrapper.state_dict()))
    resumed.initialize_count_status(model, 2, 4)
    step(resumed, model, torch.ones(4, 3), 0)
    assert resumed.scheduled_rho == pytest.approx(0.05)
