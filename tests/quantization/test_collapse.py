"""When post-training quantization is said to have collapsed, and what the warning names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mm_sharp.quantization.calibration import collapse_warning
from tests.mmpose_cases import QUIET
from tests.quantized_toys import batches, quantized
from tests.toys import same_state

pytestmark = QUIET
(BATCH,) = batches(1, seed=5)


def corrupted() -> Any:
    """All that goes into the second convolution is rounded to 0."""
    model = quantized('W8A8')
    with torch.no_grad():
        model.branch.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value.mul_(1e4)
        model.head.weight_quant.tensor_quant.scaling_impl.value.mul_(1e4)
    return model


def never() -> dict[str, float]:
    raise AssertionError('the float model was evaluated')


def test_a_model_that_keeps_its_outputs_costs_no_second_evaluation() -> None:
    model = quantized('W8A8')
    assert collapse_warning(model, BATCH, {'coco/AP': 0.7, 'EPE': 0.0, 'coco/AP (L)': -1.0}, never) is None
    assert same_state(model, quantized('W8A8'))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_the_layers_that_are_changed_most_are_named() -> None:
    warning = collapse_warning(corrupted(), BATCH, {'PCK': 0.1}, lambda: {'PCK': 0.9})
    assert warning is not None
    assert 'takes PCK from 0.9000 to 0.1000' in warning
    named = warning.partition('most, ')[2]
    assert named.startswith(('branch (weights by 0%, input by 100%', 'head (weights by 100%, input by 0%'))
    assert named.index('branch') < named.index('conv')
    assert named.index('head') < named.index('conv')
    assert '\n' not in warning


@pytest.mark.parametrize(
    ('name', 'before', 'after', 'collapsed'),
    [
        ('coco/AP', 0.7, 0.4, False),
        ('coco/AP', 0.7, 0.3, True),
        ('coco/AP', 0.7, 0.0, True),
        ('MRRPE', 30.0, 10.0, False),  # InterHand2.6M's, in mm
        ('MRRPE', 30.0, 70.0, True),
        ('coco/AP', 0.7, math.nan, True),
        ('coco/AP', math.nan, 0.2, False),
        ('coco/AP .5', 0.7, 0.0, False),  # a part of a metric
        ('EPE', 4.0, 7.0, False),
        ('EPE', 4.0, 9.0, True),
        ('NME', 0.05, 0.5, True),
        ('EPE', 4.0, math.inf, True),
    ],
)
def test_what_a_collapse_is(name: str, before: float, after: float, collapsed: bool) -> None:
    warning = collapse_warning(corrupted(), BATCH, {name: after}, lambda: {name: before})
    assert (warning is not None) is collapsed


def test_a_metric_of_0_is_measured_in_float_whatever_the_outputs() -> None:
    model = quantized('W8A8')
    warning = collapse_warning(model, BATCH, {'PCK': 0.0}, lambda: {'PCK': 0.0})
    assert warning is not None
    assert 'PCK is 0.0000 without the quantizers, too' in warning
    warning = collapse_warning(model, BATCH, {'PCK': 0.0}, lambda: {'PCK': 0.5})
    assert warning is not None
    assert 'takes PCK from 0.5000 to 0.0000' in warning
