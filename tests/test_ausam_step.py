"""AUSAM's steps equal a reference written by hand, given the same draws."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.wrappers import build, momentum_sgd

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
    wrapper = AUSAMOptimWrapper(momentum_sgd(ours, lr), sampling_ratio=sampling_ratio, **options)
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
    """The wrapper's history as the reference keeps it."""
    ((name, fields),) = wrapper.state_dict()['mm_sharp']['history']['data_sets'].items()
    assert name == ''
    columns = zip(*(fields[column].tolist() for column in ('ids', 'averages', 'visits')), strict=True)
    return {number: (average, visits) for number, average, visits in columns}


def assert_same_history(wrapper: AUSAMOptimWrapper, reference: ReferenceAUSAM) -> None:
    assert history_of(wrapper) == reference.history
