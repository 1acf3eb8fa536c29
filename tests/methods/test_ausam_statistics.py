"""AUSAM's draws over many steps: inclusion probabilities and unbiased gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp.per_sample_loss import PerSampleLoss
from mm_sharp.samples.draw import BatchDraw
from mm_sharp.samples.selection import horvitz_thompson_weights, inclusion_probabilities, systematic_choice
from tests.toys import Batch, Notes
from tests.wrappers import constant_ausam

NAN = math.nan
# Ties, zeros, one dominant score, and samples never seen.
SCORES = [0.0, 0.0, 0.2, 0.2, 0.2, 90.0, NAN, NAN]


class Line(BaseModel):
    """A linear regressor without BatchNorm.

    Args:
        losses: Which it has: ``'mean'`` and ``'sum'`` over the batch, and ``'rows'``, a loss of shape (N,).
    """

    def __init__(self, *losses: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.kinds = losses
        self.mean_loss, self.sum_loss = nn.MSELoss(), nn.SmoothL1Loss(reduction='sum')

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        output = self.layer(inputs)
        losses = {}
        if 'mean' in self.kinds:
            losses['loss_mean'] = self.mean_loss(output, targets)
        if 'sum' in self.kinds:
            losses['loss_sum'] = self.sum_loss(output, targets)
        if 'rows' in self.kinds:
            losses['loss_rows'] = (output - targets).square().mean(1)
        return losses


def line(*losses: str, dtype: torch.dtype = torch.float32) -> tuple[Line, Batch]:
    """A model and 8 samples of very different loss."""
    generator = torch.Generator().manual_seed(2)
    model = Line(*losses)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs, targets = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)
    targets[::3] *= 4
    return model.to(dtype), dict(inputs=inputs.to(dtype), targets=targets.to(dtype), sample_idx=torch.arange(8))


def flat_gradient(model: Line, batch: Batch) -> Tensor:
    loss = model.parse_losses(model(**batch))[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# -------------------------------------------------------------------- the exact expectation
def all_draws(pi: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every subset that can be drawn, with its probability: all orders, and for each all intervals of the start."""
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(pi))):
        ends = itertools.accumulate(pi[i] for i in order)
        edges = sorted({0.0, 1.0, *(end % 1 for end in ends)})
        for low, high in itertools.pairwise(edges):
            if high - low < 1e-12:  # two edges that are one, but for rounding
                continue
            chosen = tuple(systematic_choice(pi, order, (low + high) / 2).tolist())
            found[chosen] = found.get(chosen, 0.0) + (high - low) / math.factorial(len(pi))
    return found


def expectation(model: Line, batch: Batch, pi: np.ndarray, reweight: bool) -> Tensor:
    """The mean of the subset's gradient over all draws, each as likely as it is."""
    recorder, total = PerSampleLoss(model), torch.zeros(())
    for chosen, probability in all_draws(pi).items():
        rows = list(chosen)
        weights = torch.from_numpy(horvitz_thompson_weights(pi, rows)) if reweight else None
        with recorder.record(weights, full_size=len(pi)):
            gradient = flat_gradient(model, {name: value[rows] for name, value in batch.items()})
        total = total + probability * gradient
    return total


LOSSES = [('mean',), ('sum',), ('rows',), ('mean', 'sum', 'rows')]
SMALL = {'bounded': ([0.0, 0.3, NAN, 2.0], 0.1), 'capped': ([0.0, 0.0, 0.5, 9.0], 0.3)}


@pytest.mark.parametrize('where', ['w', 'w + e'])
@pytest.mark.parametrize(('scores', 's_min'), SMALL.values(), ids=SMALL)
@pytest.mark.parametrize('losses', LOSSES, ids='+'.join)
def test_the_expected_gradient_of_all_draws_is_the_whole_batchs(
    losses: tuple[str, ...], scores: list[float], s_min: float, where: str
) -> None:
    model, whole = line(*losses, dtype=torch.float64)
    batch = {name: value[:4] for name, value in whole.items()}
    if where == 'w + e':
        with torch.no_grad():
            model.layer.weight.add_(0.3 * torch.randn(2, 3, generator=torch.Generator().manual_seed(3)))
    pi = inclusion_probabilities(scores, 2, s_min)
    assert sum(all_draws(pi).values()) == pytest.approx(1.0, rel=1e-12)
    assert len(all_draws(pi)) > 2
    expected = flat_gradient(model, batch)
    weighted = expectation(model, batch, pi, reweight=True)
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-12)
    plain = expectation(model, batch, pi, reweight=False)
    assert (plain - expected).norm() > 0.05 * expected.norm(), 'without weights there must be a bias'


def test_without_weights_equal_scores_are_unbiased() -> None:
    model, whole = line('mean', 'sum', dtype=torch.float64)
    batch = {name: value[:4] for name, value in whole.items()}
    pi = inclusion_probabilities([0.7] * 4, 2)
    torch.testing.assert_close(expectation(model, batch, pi, reweight=False), flat_gradient(model, batch))


# -------------------------------------------------------------------- through the whole wrapper
class Watched(SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.seen: list[Tensor] = Notes()

    def step(self, closure: Any = None) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']]))


@dataclass
class Run:
    """What many steps on one batch with a frozen history gave: draws, and the gradients of both passes."""

    draws: list[BatchDraw]
    first: Tensor
    second: Tensor
    whole: Tensor
    whole_perturbed: Tensor

    def frequencies(self) -> np.ndarray:
        counts = np.bincount(np.concatenate([draw.chosen for draw in self.draws]), minlength=8)
        frequencies: np.ndarray = counts / len(self.draws)
        return frequencies


def many_steps(losses: tuple[str, ...], steps: int, **options: Any) -> Run:
    """Train with a learning rate of 0; the perturbation is the same in every step, whatever the samples drawn."""
    torch.manual_seed(1)
    model, batch = line(*losses)
    optimizer, draws, first = Watched(model), [], []
    wrapper = constant_ausam(optimizer, **options)
    wrapper.history.update([('', i) for i, score in enumerate(SCORES)], SCORES)
    generator = torch.Generator().manual_seed(8)
    e = [0.5 * torch.randn(p.shape, generator=generator) for p in model.parameters()]

    def perturb_(parameters: list[nn.Parameter], gradients: list[Tensor], *_: Any, **__: Any) -> Tensor:
        first.append(torch.cat([gradient.flatten() for gradient in gradients]).clone())
        with torch.no_grad():
            torch._foreach_add_(parameters, e)
        return first[-1].norm()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mm_sharp.step.ascent.perturb_', perturb_)
        patch.setattr(wrapper, 'visit', lambda *_: None)
        for _ in range(steps):
            model.train_step(batch, wrapper)
            draws.append(wrapper._draw)
    whole = flat_gradient(model, batch)
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), e)
    return Run(draws, torch.stack(first), torch.stack(optimizer.seen), whole, flat_gradient(model, batch))


def standard_errors(samples: Tensor, expected: Tensor) -> float:
    """The largest distance of a mean from what is expected, in standard errors."""
    error = samples.double().std(0) / math.sqrt(len(samples))
    return ((samples.double().mean(0) - expected.double()).abs() / error).max().item()


@pytest.fixture(scope='module')
def reweighted() -> Run:
    return many_steps(('mean', 'sum', 'rows'), 1500, sampling_ratio=0.5, reweight=True)


def assert_frequencies(run: Run) -> None:
    pi = run.draws[0].pi
    assert all((draw.pi == pi).all() for draw in run.draws)
    error = np.sqrt(pi * (1 - pi) / len(run.draws))
    assert (np.abs(run.frequencies() - pi) <= 4 * error + 1e-12).all()


@pytest.mark.slow
def test_inclusion_frequencies_match_pi(reweighted: Run) -> None:
    z = [0.0, 0.0, *[0.2 / 90] * 3, 1.0, 1.0, 1.0]
    sizes = [0.3 + 0.7 * x for x in z]
    assert reweighted.draws[0].pi == pytest.approx([4 * size / sum(sizes) for size in sizes], rel=1e-6)
    assert_frequencies(reweighted)
    assert all(len(set(draw.chosen.tolist())) == len(draw.chosen) == 4 for draw in reweighted.draws)


@pytest.mark.slow
def test_both_gradients_are_unbiased(reweighted: Run) -> None:
    assert standard_errors(reweighted.first, reweighted.whole) < 4
    assert standard_errors(reweighted.first, reweighted.whole_perturbed) > 4
    assert standard_errors(reweighted.second, reweighted.whole_perturbed) < 4


@pytest.mark.slow
def test_without_weights_both_gradients_are_biased() -> None:
    run = many_steps(('mean', 'sum', 'rows'), 300, sampling_ratio=0.5)
    assert standard_errors(run.first, run.whole) > 8
    assert standard_errors(run.second, run.whole_perturbed) > 8


@pytest.mark.slow
def test_a_capped_sample_is_in_every_draw() -> None:
    run = many_steps(('rows',), 600, sampling_ratio=0.6, s_min=0.05)
    assert run.draws[0].pi[5:].tolist() == [1.0] * 3
    assert run.frequencies()[5:].tolist() == [1.0] * 3
    assert_frequencies(run)


@pytest.mark.slow
def test_equal_bounds_draw_uniformly() -> None:
    run = many_steps(('rows',), 600, sampling_ratio=0.3, s_min=0.8, s_max=0.8)
    assert run.draws[0].pi.tolist() == [3 / 8] * 8
    assert_frequencies(run)
    # In a fixed order the frequencies would be the same, but few of the 56 subsets would ever be drawn.
    assert len({tuple(draw.chosen.tolist()) for draw in run.draws}) == math.comb(8, 3)
