"""AUSAM's draws over many steps: inclusion probabilities, unbiased gradients, and what the scores are worth."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam

from mm_sharp import AUSAMOptimWrapper
from mm_sharp.batch_draw import BatchDraw
from mm_sharp.per_sample_loss import PerSampleLoss
from mm_sharp.sampling import horvitz_thompson_weights, inclusion_probabilities, systematic_choice
from tests.toys import Batch, ToyNet, batches, make

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
        self.seen: list[Tensor] = []

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
    wrapper = AUSAMOptimWrapper(optimizer, **options)
    wrapper.history.update([('', i) for i, score in enumerate(SCORES)], SCORES)
    generator = torch.Generator().manual_seed(8)
    e = [0.5 * torch.randn(p.shape, generator=generator) for p in model.parameters()]

    def climb(parameters: list[nn.Parameter], gradients: list[Tensor], *_: Any, **__: Any) -> Tensor:
        first.append(torch.cat([gradient.flatten() for gradient in gradients]).clone())
        with torch.no_grad():
            torch._foreach_add_(parameters, e)
        return first[-1].norm()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mm_sharp.two_pass.climb', climb)
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
    return many_steps(('mean', 'sum', 'rows'), 1000, sampling_ratio=0.5, reweight=True)


def assert_frequencies(run: Run) -> None:
    pi = run.draws[0].pi
    assert all((draw.pi == pi).all() for draw in run.draws)
    error = np.sqrt(pi * (1 - pi) / len(run.draws))
    assert (np.abs(run.frequencies() - pi) <= 4 * error + 1e-12).all()


def test_inclusion_frequencies_match_pi(reweighted: Run) -> None:
    z = [0.0, 0.0, *[0.2 / 90] * 3, 1.0, 1.0, 1.0]
    sizes = [0.3 + 0.7 * x for x in z]
    assert reweighted.draws[0].pi == pytest.approx([4 * size / sum(sizes) for size in sizes], rel=1e-6)
    assert_frequencies(reweighted)
    assert all(len(set(draw.chosen.tolist())) == len(draw.chosen) == 4 for draw in reweighted.draws)


def test_both_gradients_are_unbiased(reweighted: Run) -> None:
    assert standard_errors(reweighted.first, reweighted.whole) < 4
    assert standard_errors(reweighted.first, reweighted.whole_perturbed) > 4
    assert standard_errors(reweighted.second, reweighted.whole_perturbed) < 4


def test_without_weights_both_gradients_are_biased() -> None:
    run = many_steps(('mean', 'sum', 'rows'), 300, sampling_ratio=0.5)
    assert standard_errors(run.first, run.whole) > 8
    assert standard_errors(run.second, run.whole_perturbed) > 8


def test_a_capped_sample_is_in_every_draw() -> None:
    run = many_steps(('rows',), 600, sampling_ratio=0.6, s_min=0.05)
    assert run.draws[0].pi[5:].tolist() == [1.0] * 3
    assert run.frequencies()[5:].tolist() == [1.0] * 3
    assert_frequencies(run)


def test_equal_bounds_draw_uniformly() -> None:
    run = many_steps(('rows',), 600, sampling_ratio=0.3, s_min=0.8, s_max=0.8)
    assert run.draws[0].pi.tolist() == [3 / 8] * 8
    assert_frequencies(run)


# -------------------------------------------------------------------- what the scores are worth
class Classifier(ToyNet):
    """A ``ToyNet`` that tells three classes apart."""

    def __init__(self, norm: bool) -> None:
        super().__init__(norm=norm)
        self.class_loss = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        output = super().forward(inputs, targets, mode='tensor')
        return output if mode != 'loss' else {'loss': self.class_loss(output, targets)}


TASKS = {
    'classification': (Classifier, lambda output: output.argmax(1), F.cross_entropy),
    'regression': (ToyNet, lambda output: 3 * output, lambda o, t: F.mse_loss(o, t) + 0.01 * o.abs().mean()),
}


def trained(task: str, norm: bool, seed: int, count: int = 256, steps: int = 300) -> tuple[ToyNet, Batch]:
    """A network that has learned what another one's outputs are, and the samples it was trained on."""
    kind, label, _ = TASKS[task]
    (batch,) = batches(1, count, seed=seed)
    with torch.no_grad():
        output = make(seed=77, norm=False)(batch['inputs'], batch['targets'], mode='tensor')
    batch['targets'] = label(output - output.mean(0))
    model = make(kind, seed=seed, norm=norm)
    wrapper = OptimWrapper(Adam(model.parameters(), lr=0.01))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(count, (32,), generator=generator)
        model.train_step({name: value[rows] for name, value in batch.items()}, wrapper)
    return model, batch


def gradient_norms(task: str, model: ToyNet, batch: Batch) -> np.ndarray:
    """The norm of each sample's own gradient, with evaluation statistics."""
    criterion = TASKS[task][2]
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Any:
        arguments = (inputs[None], targets[None])
        output = torch.func.functional_call(model, (parameters, buffers), arguments, {'mode': 'tensor'})
        return criterion(output, targets[None])

    model.eval()
    detached = {name: weight.detach() for name, weight in weights.items()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, batch['inputs'], batch['targets'])
    model.train()
    norms: np.ndarray = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1).numpy()
    return norms


def scores_after(model: ToyNet, batch: Batch, size: int, steps: int) -> np.ndarray:
    """|l_i(w + e) - l_i(w)| averaged over ``steps`` batches of ``size``, as AUSAM's history has it."""
    wrapper = AUSAMOptimWrapper(SGD(model.parameters(), lr=0.0), sampling_ratio=1.0)
    generator = torch.Generator().manual_seed(5)
    count = len(batch['inputs'])
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-steps * size // count))])
    for rows in order[: steps * size].split(size):
        model.train_step({name: value[rows] for name, value in batch.items()}, wrapper)
    wrapper.exchange_history()
    scores: np.ndarray = wrapper.history.scores([('', i) for i in range(count)])
    return scores


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks (there are no ties among floats like these)."""
    ranks = [values.argsort().argsort().astype(float) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([0.1, 5.0, 7.0]), np.array([1.0, 2.0, 900.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


@pytest.mark.parametrize('seed', [0, 1])
def test_loss_differences_rank_samples_as_their_gradient_norms_do(seed: int, record_property: Any) -> None:
    """Without BatchNorm, on a network that has learned its task: one pass over all samples, and AUSAM's averages."""
    model, batch = trained('classification', norm=False, seed=seed)
    norms = gradient_norms('classification', model, batch)
    once, averaged = scores_after(model, batch, 256, 1), scores_after(model, batch, 16, 64)
    record_property('one pass over all samples', rank_correlation(once, norms))
    record_property('history of batches of 16', rank_correlation(averaged, norms))
    assert rank_correlation(once, norms) >= 0.9
    assert rank_correlation(averaged, norms) >= 0.9


@pytest.mark.parametrize(('task', 'norm'), [('classification', True), ('regression', False), ('regression', True)])
def test_figures_that_are_reported_as_they_are(task: str, norm: bool, record_property: Any) -> None:
    """BatchNorm mixes the samples of a batch; in regression near its end one direction says little of each sample."""
    model, batch = trained(task, norm=norm, seed=0)
    norms = gradient_norms(task, model, batch)
    for name, scores in (
        ('one pass over all samples', scores_after(model, batch, 256, 1)),
        ('one pass in batches of 32', scores_after(model, batch, 32, 8)),
        ('history of batches of 16', scores_after(model, batch, 16, 64)),
    ):
        correlation = rank_correlation(scores, norms)
        record_property(name, correlation)
        assert 0 < correlation < 1
