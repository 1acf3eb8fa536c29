"""What a step costs in theory."""

from __future__ import annotations

from typing import Any

import pytest

from mm_sharp import (
    AUSAMOptimWrapper,
    ESAMOptimWrapper,
    FriendlySAMOptimWrapper,
    GSAMOptimWrapper,
    LookSAMOptimWrapper,
    MSAMOptimWrapper,
    SAMOptimWrapper,
    WSAMOptimWrapper,
)
from mm_sharp.step.method import Cost
from mm_sharp.step.wrapper import TwoPassOptimWrapper

HISTORY = {'selection': 'history'}


@pytest.mark.parametrize(
    ('kind', 'settings', 'batch_size', 'step', 'mean', 'length'),
    [
        (SAMOptimWrapper, {}, 32, 2, 2, 1),
        (SAMOptimWrapper, {'adaptive': True}, 32, 2, 2, 1),
        (SAMOptimWrapper, {'interval': 5}, 32, 1, 1.2, 5),
        (LookSAMOptimWrapper, {}, 32, 1, 1.2, 5),
        (FriendlySAMOptimWrapper, {}, 32, 2, 2, 1),
        (GSAMOptimWrapper, {}, 32, 2, 2, 1),
        (WSAMOptimWrapper, {}, 32, 2, 2, 1),
        (MSAMOptimWrapper, {}, 32, 1, 1, 1),
        (ESAMOptimWrapper, {}, 32, 1.7, 1.7, 1),
        (ESAMOptimWrapper, {}, 1, 5.6 / 3, 5.6 / 3, 1),  # the only sample is taken without a selection
        (ESAMOptimWrapper, {'beta': 1.0, 'gamma': 1.0}, 32, 2, 2, 1),
        (ESAMOptimWrapper, HISTORY, 32, 4.1 / 3, 4.2 / 3, 10),
        (ESAMOptimWrapper, HISTORY, 5, (2.6 + 1.8) / 3, (2.7 + 1.8) / 3, 10),  # 3 of 5 samples
        (ESAMOptimWrapper, {**HISTORY, 'refresh': 1}, 32, 1.7, 1.7, 1),
        (ESAMOptimWrapper, {**HISTORY, 'gamma': 1.0}, 32, 5.6 / 3, 5.6 / 3, 1),
        (AUSAMOptimWrapper, {'schedule': 'constant'}, 100, 1.2, 1.2, 1),
        (AUSAMOptimWrapper, {'schedule': 'constant'}, 32, 1.25, 1.25, 1),  # 20 of 32 samples
        (AUSAMOptimWrapper, {'s_min': 0.3, 'sampling_ratio': 0.5}, 32, 1, 1, 1),
        (AUSAMOptimWrapper, {'draw': 'uniform'}, 32, 1, 1, 1),
    ],
)
def test_theoretical_costs(
    kind: type[TwoPassOptimWrapper],
    settings: dict[str, Any],
    batch_size: int,
    step: float,
    mean: float,
    length: int,
) -> None:
    found = kind.theoretical_cost(batch_size, **settings)
    assert found == Cost(pytest.approx(step), pytest.approx(mean), length)


@pytest.mark.parametrize(('batch_size', 'step'), [(32, 1.0), (5, 1.2), (1, 2.0)])
def test_ausams_first_epoch_costs_what_sam_costs(batch_size: int, step: float) -> None:
    """1.00 + 1 / epochs; where all steps cost as much, nothing is said of it."""
    cost = AUSAMOptimWrapper.theoretical_cost(batch_size)
    assert cost == Cost(pytest.approx(step), pytest.approx(step), 1, None if batch_size == 1 else 2.0)
    assert cost.over(20) == pytest.approx(step + (2 - step) / 20)
