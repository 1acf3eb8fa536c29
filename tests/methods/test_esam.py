"""ESAM equals a hand-written reference given the same random draws, bit for bit on the CPU; what it selects."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp import ESAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.samples.seeds import Draw, make_generator
from tests.references_esam import ReferenceESAM, ToyLoss
from tests.toys import Batch, Notes, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import momentum_sgd

both = pytest.mark.parametrize('refresh', [None, 3], ids=['exact', 'history'])
MEAN = ToyLoss()


class SizeSum(nn.Module):
    """The penalty on large outputs as a sum over the batch."""

    def forward(self, output: Tensor) -> Tensor:
        return 0.01 * output.abs().sum()


def toy(loss: ToyLoss = MEAN, **kwargs: Any) -> ToyNet:
    """A ``ToyNet`` with the loss modules that ``loss`` has by formula."""
    model = make(**kwargs)
    # Before BatchNorm it changes no loss: perturbed alone, it would leave the selection to rounding.
    model.conv.bias = None
    if loss.square_sum:
        model.square_loss = nn.MSELoss(reduction='sum')
    if loss.size_sum:
        model.size_loss = SizeSum()
    return model


class Rows:
    """The ids of the samples that each forward pass with gradients ran on."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: list[list[int]] = Notes()
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.ids.append(kwargs['sample_idx'].tolist())


def selecting(refresh: int | None) -> dict[str, Any]:
    """The wrapper's arguments: the exact selection, or the history's with its ``refresh``."""
    return dict(selection='history', refresh=refresh) if refresh else {}


class LineNet(BaseModel):
    """Returns losses of shape (N,), w * x_i, so that the increases are e * x_i; with ``log``, -log(1 - w * x_i)."""

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        self.weight, self.log = nn.Parameter(torch.zeros(())), log

    def forward(self, inputs: Tensor, sample_idx: Any = None, mode: str = 'loss') -> dict[str, Tensor]:
        products = self.weight * inputs
        return {'loss': -torch.log(1 - products) if self.log else products}


def line(values: list[float], first_id: int = 0) -> Batch:
    return {'inputs': torch.tensor(values), 'sample_idx': torch.arange(first_id, first_id + len(values))}


def pool_batches(count: int, size: int = 8, pool: int = 24) -> list[Batch]:
    """``count`` batches of ``size`` distinct samples out of ``pool``, so that samples come again."""
    (samples,) = batches(1, pool)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randperm(pool, generator=generator)[:size] for _ in range(count)]
    return [{name: value[chosen] for name, value in samples.items()} for chosen in rows]


def draws(wrapper: ESAMOptimWrapper, model: nn.Module, step: int, size: int) -> tuple[list[bool], list[int]]:
    """What the wrapper draws in a step: which tensors are perturbed, and the order of samples with equal history."""
    mask = weight_mask(len(list(model.parameters())), wrapper.beta, make_generator(wrapper.seed, Draw.MASK, step))
    return mask, torch.randperm(size, generator=make_generator(wrapper.seed, Draw.TIES, 0, step)).tolist()


def pair(
    loss: ToyLoss = MEAN, *, lr: float = 0.01, refresh: int | None = None, **kwargs: Any
) -> tuple[ToyNet, ESAMOptimWrapper, ReferenceESAM]:
    """A model with ESAM around it, and the reference around its twin; ``refresh`` makes it ``'history'``."""
    ours, theirs = toy(loss), toy(loss)
    wrapper = ESAMOptimWrapper(momentum_sgd(ours, lr), **selecting(refresh), **kwargs)
    return ours, wrapper, ReferenceESAM(theirs, momentum_sgd(theirs, lr), refresh=refresh, loss=loss, **kwargs)


def train_both(ours: ToyNet, wrapper: ESAMOptimWrapper, reference: ReferenceESAM, data: list[Batch]) -> None:
    """Train both, comparing weights, buffers, momenta and what the second pass ran on after every step."""
    rows = Rows(ours)
    for step, batch in enumerate(data):
        ours.train_step(batch, wrapper)
        reference.step(batch, *draws(wrapper, ours, step, len(batch['targets'])))
        assert same_state(ours, reference.model)
        assert rows.ids[-1] == batch['sample_idx'][reference.rows[-1]].tolist()
    for left, right in zip(ours.parameters(), reference.model.parameters(), strict=True):
        momenta = wrapper.optimizer.state[left], reference.optimizer.state[right]
        assert same_bits(momenta[0]['momentum_buffer'], momenta[1]['momentum_buffer'])


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
@pytest.mark.parametrize('gamma', [0.3, 0.5, 1.0])
@pytest.mark.parametrize('beta', [0.2, 0.6, 1.0])
def test_fifty_steps_equal_the_reference_bit_for_bit(refresh: int | None, gamma: float, beta: float) -> None:
    ours, wrapper, reference = pair(refresh=refresh, gamma=gamma, beta=beta)
    train_both(ours, wrapper, reference, pool_batches(50))
    assert ours.norm.num_batches_tracked.item() == wrapper.steps == 50
    assert not same_state(ours, toy())


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
def test_with_asam_too(refresh: int | None) -> None:
    train_both(*pair(refresh=refresh, adaptive=True, rho=0.5), pool_batches(50))


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
@pytest.mark.parametrize(
    'loss', [ToyLoss(True, True), ToyLoss(True, False), ToyLoss(False, True)], ids=['sum', 'sum + mean', 'mean + sum']
)
def test_a_summed_loss_is_scaled_by_n_over_k(refresh: int | None, loss: ToyLoss) -> None:
    train_both(*pair(loss, lr=0.002, refresh=refresh, gamma=0.3), pool_batches(50))


def test_the_history_equals_the_references() -> None:
    ours, wrapper, reference = pair(refresh=10)
    train_both(ours, wrapper, reference, pool_batches(50))
    wrapper.visits.flush()
    ids = sorted(reference.history)
    assert sum(visits for _, visits in reference.history.values()) == 5 * 8
    assert max(visits for _, visits in reference.history.values()) > 1
    assert len(wrapper.history) == len(ids)
    scores = wrapper.history.scores([('', i) for i in ids])
    assert scores == pytest.approx([reference.history[i][0] for i in ids], rel=1e-6)
    # Selections were made by batches that were measured in part, and by such that were measured as a whole.
    unmeasured = [scores.count(None) for step, scores in enumerate(reference.scores) if step % 10]
    assert 0 in unmeasured
    assert any(0 < count < 8 for count in unmeasured)


def test_both_selections_and_every_option_differ() -> None:
    """The comparisons above could not fail if an option had no effect."""
    ends = []
    for options in ({}, {'refresh': 10}, {'refresh': 1}, {'gamma': 0.3}, {'beta': 0.9}, {'adaptive': True}):
        ours, wrapper, _ = pair(**options)
        for batch in pool_batches(12):
            ours.train_step(batch, wrapper)
        ends.append(ours)
    exact, history, measured_always, *others = ends
    # Measured in every step, the history decides nothing.
    assert same_state(exact, measured_always)
    assert not any(same_state(exact, other) for other in (history, *others))


@pytest.mark.parametrize('refresh', [None, 2], ids=['exact', 'history'])
def test_accumulation_draws_and_selects_anew_for_every_micro_batch(refresh: int | None) -> None:
    ours, _, reference = pair(refresh=refresh)
    wrapper = ESAMOptimWrapper(momentum_sgd(ours, 0.01), accumulative_counts=3, **selecting(refresh))
    data = pool_batches(3)
    for batch in data:
        ours.train_step(batch, wrapper)
    final = [reference.gradients(batch, *draws(wrapper, ours, step, 8)) for step, batch in enumerate(data)]
    for parameter, *parts in zip(reference.model.parameters(), *final, strict=True):
        parameter.grad = sum(parts) / 3
    reference.optimizer.step()
    for left, right in zip(ours.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ selection
def test_the_samples_with_the_largest_increase_are_kept() -> None:
    """By brute force: every sample's loss by itself, at the weights that each pass saw."""
    model = make()
    twin, rows = deepcopy(model), Rows(model)
    weights: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, _: weights.append(deepcopy(module.state_dict())))
    wrapper = ESAMOptimWrapper(momentum_sgd(model), gamma=0.3)

    def losses(state: dict[str, Tensor], batch: Batch) -> list[float]:
        twin.load_state_dict(state)
        outputs = twin(**batch, mode='tensor').detach()
        pairs = [(outputs[i : i + 1], batch['targets'][i : i + 1]) for i in range(len(outputs))]
        return [(twin.square_loss(output, target) + twin.size_loss(output)).item() for output, target in pairs]

    for step, batch in enumerate(batches(10)):
        model.train_step(batch, wrapper)
        before, after = (losses(state, batch) for state in weights[3 * step : 3 * step + 2])
        order = sorted(range(8), key=lambda i: before[i] - after[i])
        assert rows.ids[-1] == batch['sample_idx'][sorted(order[:3])].tolist()
        assert wrapper.last_step.perturbed_loss.item() == pytest.approx(sum(after) / 8, rel=1e-5)


@pytest.mark.parametrize(
    ('gamma', 'kept'), [(0.25, [1, 2]), (0.5, [1, 2, 4, 6]), (0.625, [1, 2, 3, 4, 6]), (0.75, [0, 1, 2, 3, 4, 6])]
)
def test_of_equal_increases_the_first_are_kept_and_none_is_lost(gamma: float, kept: list[int]) -> None:
    """On a model that returns losses of shape (N,): no loss module, no hook."""
    model = LineNet()
    rows = Rows(model)
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=1.0), beta=1.0, gamma=gamma)
    values = [1.0, 3, 3, 2, 3, 1, 3, 0]
    model.train_step(line(values), wrapper)
    assert rows.ids == [list(range(8)), kept]
    assert model.weight.item() == pytest.approx(-sum(values[i] for i in kept) / len(kept))


@both
def test_all_samples_equal(refresh: int | None) -> None:
    model = LineNet()
    rows = Rows(model)
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.1), beta=1.0, **selecting(refresh))
    for _ in range(4):
        model.train_step(line([2.0] * 8), wrapper)
        assert wrapper.last_step.metrics()['sampling_entropy'] == pytest.approx(1.0)
    assert rows.ids[1] == [0, 1, 2, 3]
    assert all(len(set(ids)) == 4 for ids in rows.ids[1::2])
    # Equal histories are taken at random, equal increases in order.
    assert (rows.ids[3] == rows.ids[5] == rows.ids[1]) == (refresh is None)
