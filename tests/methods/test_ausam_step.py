"""AUSAM's steps equal a reference written by hand, given the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mm_sharp import AUSAMOptimWrapper
from tests.references_ausam import (
    Batch,
    Formula,
    ReferenceAUSAM,
    inclusion_probabilities,
    mean_sizes,
    mean_squares,
    sum_squares,
    terms,
)
from tests.toys import ToyNet, batches, make, same_bits, same_state
from tests.wrappers import build, constant_ausam, momentum_sgd

SAMPLES, SIZE = 40, 8


class SumNet(ToyNet):
    """Its squared error is a sum over the batch, its penalty a mean."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.square_loss = nn.MSELoss(reduction='sum')


class OnlySumNet(SumNet):
    """Its only loss is a sum over the batch."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        output = super().forward(inputs, targets, mode='tensor')
        return output if mode != 'loss' else {'loss_square': self.square_loss(output, targets)}


NETS: dict[str, tuple[type[ToyNet], Formula, float]] = {
    'mean': (ToyNet, terms(mean_squares, mean_sizes), 0.05),
    'sum': (OnlySumNet, terms(sum_squares), 0.002),
    'sum and mean': (SumNet, terms(sum_squares, mean_sizes), 0.002),
}


def epochs(steps: int, size: int = SIZE) -> list[Batch]:
    """Batches of the same samples over and over, in another order in every epoch."""
    (whole,) = batches(1, SAMPLES)
    generator = torch.Generator().manual_seed(4)
    found: list[Batch] = []
    while len(found) < steps:
        order = torch.randperm(SAMPLES, generator=generator)
        found += [{name: value[rows] for name, value in whole.items()} for rows in order.split(size)]
    return found[:steps]


def train_both(
    net: str, steps: int = 50, size: int = SIZE, sampling_ratio: float = 0.6, **options: Any
) -> tuple[ToyNet, ToyNet, AUSAMOptimWrapper, ReferenceAUSAM]:
    """The wrapper's model and the reference's after as many steps; pi is compared in every step."""
    kind, formula, lr = NETS[net]
    ours, theirs = make(kind), make(kind)
    wrapper = constant_ausam(momentum_sgd(ours, lr), sampling_ratio=sampling_ratio, **options)
    reference = ReferenceAUSAM(theirs, momentum_sgd(theirs, lr), formula, **options)
    for batch in epochs(steps, size):
        ours.train_step(batch, wrapper)
        draw = wrapper._draw
        assert draw is not None
        assert len(draw.chosen) == -(-round(100 * sampling_ratio) * size // 100)
        pi = reference.step(batch, draw.chosen.tolist())
        assert draw.pi == pytest.approx(pi, rel=1e-12, abs=0)
    return ours, theirs, wrapper, reference


def history_of(wrapper: AUSAMOptimWrapper) -> dict[int, tuple[float, int]]:
    """The wrapper's history, the last step's visits included, as the reference keeps it."""
    wrapper.exchange_history()
    ((name, fields),) = wrapper.history.state_dict()['data_sets'].items()
    assert name == ''
    columns = zip(*(fields[column].tolist() for column in ('ids', 'averages', 'visits')), strict=True)
    return {number: (average, visits) for number, average, visits in columns}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'plain': ('mean', {}),
    'reweight': ('mean', {'reweight': True}),
    'momentum': ('mean', {'history_momentum': 0.8, 's_min': 0.1, 's_max': 2.0}),
    'small ones': ('mean', {'prefer': 'small'}),
    'small ones, clipped': ('mean', {'prefer': 'small', 'clip_quantile': 0.7, 's_min': 0.05}),
    'clipped, reweight': ('mean', {'clip_quantile': 0.7, 'reweight': True}),
    'adaptive': ('mean', {'adaptive': True, 'rho': 0.5}),
    'sum': ('sum', {}),
    'sum, reweight': ('sum', {'reweight': True}),
    'sum and mean': ('sum and mean', {'history_momentum': 0.8}),
    'sum and mean, reweight': ('sum and mean', {'reweight': True, 'adaptive': True, 'rho': 0.5}),
}


@pytest.mark.parametrize('case', CASES)
def test_fifty_steps_equal_the_reference_bit_for_bit(case: str) -> None:
    net, options = CASES[case]
    ours, theirs, wrapper, reference = train_both(net, **options)
    assert same_state(ours, theirs)
    assert not same_state(ours, make(NETS[net][0]))
    assert ours.norm.num_batches_tracked.item() == 50
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    for own, their in pairs:
        momentum = reference.optimizer.state[their]['momentum_buffer']
        assert same_bits(wrapper.optimizer.state[own]['momentum_buffer'], momentum)
    assert history_of(wrapper) == reference.history
    assert sum(visits for _, visits in reference.history.values()) == 50 * 5


@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('reweight', [False, True])
def test_one_sample_of_each_batch(net: str, reweight: bool) -> None:
    """Of one sample alone, sum and mean are the same, and still the sum is scaled by N."""
    ours, theirs, wrapper, reference = train_both(net, steps=12, sampling_ratio=0.05, reweight=reweight)
    assert same_state(ours, theirs)
    assert history_of(wrapper) == reference.history


def test_sums_of_batches_of_changing_size() -> None:
    """N / K is that of each batch: ceil(0.6 * 3) of 3, and 1 of the last, which has one sample."""
    ours, theirs = make(SumNet), make(SumNet)
    wrapper = constant_ausam(momentum_sgd(ours, 0.002))
    reference = ReferenceAUSAM(theirs, momentum_sgd(theirs, 0.002), NETS['sum and mean'][1])
    (whole,) = batches(1, 20)
    for size, expected in ((8, 5), (3, 2), (5, 3), (1, 1), (8, 5), (3, 2)):
        batch = {name: value[:size] for name, value in whole.items()}
        ours.train_step(batch, wrapper)
        rows = wrapper._draw.chosen.tolist()
        assert len(rows) == expected
        assert wrapper._draw.pi == pytest.approx(reference.step(batch, rows), rel=1e-12, abs=0)
    assert same_state(ours, theirs)
    assert history_of(wrapper) == reference.history


@pytest.mark.parametrize('reweight', [False, True])
def test_accumulated_micro_batches_have_draws_and_perturbations_of_their_own(reweight: bool) -> None:
    ours, theirs = make(SumNet), make(SumNet)
    wrapper = constant_ausam(momentum_sgd(ours, 0.002), accumulative_counts=3, reweight=reweight)
    reference = ReferenceAUSAM(theirs, momentum_sgd(theirs, 0.002), NETS['sum and mean'][1], reweight=reweight)
    finals = []
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        rows = wrapper._draw.chosen.tolist()
        weights = [1 / (8 * 5 / 8)] * 5 if reweight else None
        finals.append(reference._passes(batch['inputs'][rows], batch['targets'][rows], weights, 8)[0])
    for parameter, *parts in zip(theirs.parameters(), *finals, strict=True):
        parameter.grad = sum(parts) / 3
    reference.optimizer.step()
    for left, right in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_every_option_changes_the_steps() -> None:
    """The comparisons above could not fail if an option had no effect."""
    results = [train_both('mean', steps=15, **options) for net, options in CASES.values() if net == 'mean']
    for number, (ours, _, wrapper, _) in enumerate(results):
        for other, _, second, _ in results[:number]:
            assert not same_state(ours, other)
            assert history_of(wrapper) != history_of(second)


def test_draws_differ_from_step_to_step_and_follow_the_history() -> None:
    model = make()
    wrapper = constant_ausam(momentum_sgd(model))
    draws = []
    for batch in [*batches(1) * 12]:
        model.train_step(batch, wrapper)
        draws.append(wrapper._draw)
    assert len({tuple(draw.chosen) for draw in draws}) > 4
    assert np.isnan(draws[0].scores).all()
    assert draws[0].pi.tolist() == [5 / 8] * 8  # of samples never seen, none is likelier
    assert not np.isnan(draws[-1].scores).any()
    assert draws[-1].pi.max() > 1.5 * draws[-1].pi.min()


def test_the_reference_on_all_samples_is_sam() -> None:
    ours, theirs = make(), make()
    sam = build('sam', ours)
    reference = ReferenceAUSAM(theirs, momentum_sgd(theirs), NETS['mean'][1])
    for batch in epochs(5):
        ours.train_step(batch, sam)
        reference.step(batch, range(SIZE))
    assert same_state(ours, theirs)


@pytest.mark.parametrize(
    ('scores', 'k', 'expected'),
    [
        ([None, None, None, None], 2, [0.5] * 4),
        ([0.0, 1.0, None, 0.5], 1, [0.3 / 2.95, 1 / 2.95, 1 / 2.95, 0.65 / 2.95]),
        ([0.0, 0.0, 0.0, 1.0], 2, [1 / 3, 1 / 3, 1 / 3, 1.0]),  # 2 / 1.9 > 1: capped
        ([0.0, 1.0], 2, [1.0, 1.0]),
    ],
)
def test_the_references_probabilities_worked_by_hand(scores: list[float | None], k: int, expected: list[float]) -> None:
    assert inclusion_probabilities(scores, k, 0.3, 1.0) == pytest.approx(expected, rel=1e-12)
