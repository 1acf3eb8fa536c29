"""Cross-layer equalization: the network computes the same, with channels of equal ranges."""

from __future__ import annotations

import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import nn

from mm_sharp.errors import UnsupportedError
from mm_sharp.quantization import calibrate, quantized_model
from mm_sharp.quantization.equalization import equalize
from mm_sharp.quantization.flow import float_output
from tests.mmpose_cases import QUIET
from tests.quantized_models import RTMPOSE, SIMCC, Toy, conv, images, policy, quantized

pytestmark = QUIET
SIZE = dict(input_size=(8, 8))


def chain() -> nn.Module:
    """Two layers with ReLU between, whose channels have ranges from 1 to 1,000; ready to be calibrated."""
    model = Toy(lambda m, x: m.b(m.r(m.a(x))), a=conv(3, 4), r=nn.ReLU(), b=conv(4, 2, bias=False))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.normal_()
        model.a.weight.mul_(torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1, 1))
        model.a.bias.zero_()
    found = quantized_model(model, {**policy(), **SIZE}).eval()
    found.quantization.calibrating = True  # so that it runs
    return found


def test_channels_are_scaled_by_opposite_factors_to_equal_ranges() -> None:
    model = chain()
    first, second = model.a.weight.detach().clone(), model.b.weight.detach().clone()
    parameters = dict(model.named_parameters())
    assert equalize(model) == 1
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    factors = (first / model.a.weight).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-4)
    assert torch.allclose(model.b.weight, second * factors[:, 0].view(1, 4, 1, 1), rtol=1e-4)
    before, after = (w.detach().flatten(1).abs().amax(1) for w in (first, model.a.weight))
    out = model.b.weight.detach().transpose(0, 1).flatten(1).abs().amax(1)
    assert float(before.max() / before.min()) > 100
    assert torch.allclose(after, out, rtol=0.1), 'each channel has the range of what takes it in'


def test_pictures_of_one_channel() -> None:
    model = Toy(lambda m, x: m.b(m.r(m.a(x))), a=conv(1, 4), r=nn.ReLU(), b=conv(4, 2))
    model.data_preprocessor = ImgDataPreprocessor(mean=[0.0], std=[1.0])
    found = quantized_model(model, {**policy(), **SIZE}).eval()
    found.quantization.calibrating = True
    assert equalize(found) == 1


def test_what_cannot_be_traced_is_refused_and_left_as_it_was() -> None:
    model = quantized_model(
        Toy(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x).relu()), a=conv(3, 4), b=conv(4, 2)),
        {**policy(), **SIZE},
    )
    before = model.a.weight.detach().clone()
    with pytest.raises(UnsupportedError, match=r'^Toy cannot be equalized: torch\.fx cannot trace it .*out$'):
        calibrate(model, [{'inputs': images(2, 0, (8, 8))}], equalize=True)
    assert torch.equal(model.a.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'some'), [(SIMCC, True), (RTMPOSE, False)], ids=['SimCC', 'RTMPose'])
def test_models_of_mmpose_compute_the_same(case: object, some: bool) -> None:
    """In RTMPose SiLU is between all layers, which leaves nothing to equalize."""
    model = quantized(case).eval()  # type: ignore[arg-type]
    model.quantization.calibrating = True
    weights = [p.detach().clone() for p in model.parameters()]
    before = float_output(model, images())
    assert (equalize(model) > 0) is some
    assert any(not torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True)) is some
    assert torch.allclose(float_output(model, images()), before, atol=1e-5 * float(before.abs().max()))
