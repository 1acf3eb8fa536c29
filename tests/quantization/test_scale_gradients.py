"""LSQ's scaling of the scales' gradients: an SGD step moves a scale as the paper's does."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp.quantization import LayerPolicy, calibrate, quantized_model
from tests.mmpose_cases import QUIET
from tests.quantized_models import Toy, conv, images, policy

pytestmark = QUIET
INPUTS = images(4, 3, (8, 8))


def toy(**changes: Any) -> nn.Module:
    """A layer with signed inputs and one with unsigned, of 4 bits, calibrated."""
    model = Toy(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6), b=conv(6, 4))
    torch.manual_seed(0)
    for layer in (model.a, model.b):
        layer.reset_parameters()
    same = dict(first_layers='same', last_layers='same', input_size=(8, 8))
    found = quantized_model(model, {**policy(4, 4), **same, **changes})
    calibrate(found, [{'inputs': INPUTS}])
    return found


def lsq(x: Tensor, step: Tensor, low: int, high: int, count: int) -> Tensor:
    """The paper's pseudo code: the gradient of the step size times g, rounding straight through.

    But, as Brevitas does, rounded before it is clamped: values less than half a step out of range are not clamped.
    """
    g = 1 / math.sqrt(count * high)
    step = (step - step * g).detach() + step * g
    scaled = x / step
    rounded = (scaled.round() - scaled).detach() + scaled
    # By hand, since the gradient of torch's clamp at its limits is another one from torch 2.15 on.
    return torch.where((rounded < low) | (rounded > high), rounded.detach().clamp(low, high), rounded) * step


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
def test_an_sgd_step_moves_scales_as_the_papers_does(granularity: str) -> None:
    model = toy(scale_gradients='lsq', weight_granularity=granularity).eval()
    for layer, inputs, low in ((model.a, INPUTS, -8), (model.b, INPUTS.relu().repeat(1, 2, 1, 1), 0)):
        weight, taken = layer.weight.detach(), inputs
        with torch.no_grad():
            steps = [layer.quant_weight().scale.clone(), layer.input_quant(taken).scale.clone()]
        features, high = taken[0].numel(), 15 if low == 0 else 7
        count = weight[0].numel() if granularity == 'channel' else weight.numel()
        ours = [p.requires_grad_(True) for p in steps]
        (
            lsq(weight, ours[0], -7, 7, count).sin().sum() + lsq(taken, ours[1], low, high, features).sin().sum()
        ).backward()
        expected = [float_step - 1e-3 * float_step.grad for float_step in ours]

        scales = [p for name, p in layer.named_parameters() if 'tensor_quant' in name]
        assert len(scales) == 2
        optimizer = SGD(scales, lr=1e-3)
        optimizer.zero_grad()
        (layer.quant_weight().value.sin().sum() + layer.input_quant(taken).value.sin().sum()).backward()
        optimizer.step()
        with torch.no_grad():
            found = [layer.quant_weight().scale, layer.input_quant(taken).scale]
        for before, mine, theirs in zip(steps, found, expected, strict=True):
            assert float((theirs - before).detach().abs().max()) > 1e-6
            assert torch.allclose(mine - before, theirs - before, rtol=2e-3, atol=1e-8)


def test_values_and_other_gradients_stay() -> None:
    plain, scaled = toy().eval(), toy(scale_gradients='lsq').eval()
    gradients = []
    for model in (plain, deepcopy(scaled)):
        output = model(INPUTS)
        output.sin().sum().backward()
        gradients.append((output.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(gradients[0][0], gradients[1][0])
    for name, gradient in gradients[0][1].items():
        assert torch.equal(gradient, gradients[1][1][name]) is ('tensor_quant' not in name), name


@pytest.mark.parametrize('name', ['weight_symmetric', 'act_symmetric'])
def test_zero_points_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scale_gradients='lsq' is for scales without zero points: write policy=dict"):
        LayerPolicy(scale_gradients='lsq', **{name: False})
