"""Learned rounding: each weight goes to one of its two integers, and the layers' outputs change less."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_sharp.quantization import calibrate, check_calibrated, quantized_model
from mm_sharp.quantization.flow import float_output
from mm_sharp.quantization.learned_rounding import learn_rounding
from tests.mmpose_cases import QUIET
from tests.quantized_models import Toy, conv, images, output, policy
from tests.toys import same_state

pytestmark = QUIET
BATCHES = [{'inputs': images(4, seed, (8, 8))} for seed in range(2)]


def toy(**changes: Any) -> nn.Module:
    """A convolution, a deconvolution and a fully connected layer, of 3 bits, calibrated."""
    layers = dict(a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False), c=nn.Linear(16, 5))
    model = Toy(lambda m, x: m.c(m.b(m.a(x).relu())), **layers)
    torch.manual_seed(0)
    for layer in (model.a, model.b, model.c):
        layer.reset_parameters()
    same = dict(first_layers='same', last_layers='same', input_size=(8, 8))
    return quantized_model(model, {**policy(3, 3), **same, **changes}).eval()


def source_of(model: nn.Module) -> nn.Module:
    """A model that was never calibrated, allowed to run without its quantizers."""
    model.quantization.calibrating = True
    return model


@torch.no_grad()
def error_of(model: nn.Module, weight: Tensor, source: nn.Module) -> float:
    """The mean square error of the first layer's output, by hand."""
    inputs = torch.cat([batch['inputs'] for batch in BATCHES])
    layer, quantizer = source.a, model.a.input_quant(inputs).value
    expected = nn.functional.conv2d(inputs, layer.weight, layer.bias, padding=1)
    found = nn.functional.conv2d(quantizer, weight, layer.bias, padding=1)
    return float((found - expected).square().mean())


@pytest.mark.parametrize('changes', [{}, dict(weight_symmetric=False), dict(weight_granularity='tensor')], ids=str)
def test_weights_lie_on_the_grid_one_step_from_where_they_were_at_most(changes: dict[str, Any]) -> None:
    model = toy(**changes)
    source = deepcopy(model)
    calibrate(model, BATCHES)
    with torch.no_grad():
        nearest = {name: getattr(model, name).quant_weight() for name in 'abc'}
        shares = learn_rounding(model, BATCHES, 80)
    assert list(shares) == ['a', 'b', 'c']
    assert all(share <= 1 for share in shares.values())
    for name, quantized in nearest.items():
        weight = getattr(model, name).weight.detach()
        assert torch.allclose(getattr(model, name).quant_weight().value, weight, atol=1e-6)
        assert torch.equal(getattr(model, name).quant_weight().scale, quantized.scale)
        steps = (weight - quantized.value) / quantized.scale
        assert float((steps - steps.round()).abs().max()) < 1e-4
        assert float(steps.abs().max()) < 1.5
    before, after = (error_of(model, weight, source) for weight in (nearest['a'].value, model.a.weight))
    assert after < 0.98 * before
    assert shares['a'] == pytest.approx(after / before, rel=1e-3)
    inputs = torch.cat([batch['inputs'] for batch in BATCHES])
    with torch.no_grad():
        expected = float_output(source_of(source), inputs)
        after = float((output(model, inputs) - expected).square().mean())
        model.c.weight.copy_(nearest['c'].value)
        before = float((output(model, inputs) - expected).square().mean())
    assert shares['c'] == pytest.approx(after / before, rel=1e-3), 'the target is the float model as it was'


def test_calibration_does_it_without_a_random_number_and_the_model_is_a_usual_one() -> None:
    first, second, plain = toy(), toy(), toy()
    state = torch.get_rng_state()
    calibrate(first, BATCHES, learned_rounding=20)
    assert torch.equal(torch.get_rng_state(), state)
    calibrate(second, BATCHES, learned_rounding=20)
    calibrate(plain, BATCHES)
    assert same_state(first, second)
    assert first.state_dict().keys() == plain.state_dict().keys()
    check_calibrated(first)
    assert not any(module._forward_pre_hooks for module in (first.a, first.b, first.c))


def test_scales_that_follow_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r'learned rounding needs scales that stay: write policy=dict\(weight_scales='):
        calibrate(toy(weight_scales='statistics'), BATCHES, learned_rounding=5)
