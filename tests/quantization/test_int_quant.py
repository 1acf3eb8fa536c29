"""The fused fake quantization against Brevitas's own, and one rounding of the weights a step."""

from __future__ import annotations

from typing import Any

import brevitas.nn
import pytest
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.restrict_val import PowerOfTwoRestrictValue
from torch import nn
from torch.optim import SGD

from mm_sharp import ESAMOptimWrapper, SAMOptimWrapper
from mm_sharp.quantization.int_quant import (
    FusedIntQuant,
    FusedRescalingIntQuant,
    is_learned_now,
    learned_scale,
    minimum_of,
)
from mm_sharp.quantization.layers import QUANTIZED
from tests.quantized_toys import batches, quantized
from tests.toys import same_bits

# Of each class of ours, Brevitas's own.
OWN: dict[type, Any] = {FusedIntQuant: IntQuant, FusedRescalingIntQuant: RescalingIntQuant}
OWN.update({kind: getattr(brevitas.nn, kind.__name__) for kind in QUANTIZED.values()})


def train(model: nn.Module, kind: Any = SAMOptimWrapper, **settings: Any) -> dict[str, torch.Tensor]:
    """Weights, scales and statistics after six micro-batches."""
    torch.manual_seed(0)
    wrapper = kind(SGD(model.parameters(), lr=0.05, momentum=0.9), rho=0.05, **settings)
    for batch in batches(6):
        model.train_step(batch, wrapper)
    return dict(model.state_dict())


def as_in_brevitas(model: nn.Module) -> nn.Module:
    """The model with Brevitas's own arithmetic, which rounds in every forward."""
    for module in model.modules():
        if type(module) in OWN:
            module.__class__ = OWN[type(module)]
    return model


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('quantize_once', [False, True])
@pytest.mark.parametrize('policy', ['W8A8', 'W4A4', 'W4A4 folded', 'statistics', 'zero points'])
def test_training_is_that_of_brevitas_bit_for_bit(policy: str, quantize_once: bool, dtype: str | None) -> None:
    settings = dict(perturb_quantized=quantize_once, dtype=dtype, accumulative_counts=2)
    expected = train(as_in_brevitas(quantized(policy)), **settings)
    found = train(quantized(policy), **settings)
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []


@pytest.mark.parametrize('settings', [dict(perturb='all'), dict(kind=ESAMOptimWrapper)])
def test_perturbed_scales_and_further_forwards_too(settings: dict[str, Any]) -> None:
    expected = train(as_in_brevitas(quantized('W4A4')), perturb_quantized=True, **settings)
    found = train(quantized('W4A4'), perturb_quantized=True, **settings)
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []


def rounded_weights(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    """How many times a step rounds the weights of the toy's three layers."""
    model, calls = quantized('W4A4'), []
    weights = {module.weight.shape for module in model.modules() if hasattr(module, 'weight_quant')}
    divide = torch.div

    def counting(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape in weights and 'out' not in kwargs:  # with it, a backward pass divides
            calls.append(x.shape)
        return divide(x, *args, **kwargs)

    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.05), rho=0.05, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'div', counting)
        model.train_step(batches(1)[0], wrapper)
    kept = [module.kept for module in model.modules() if isinstance(module, FusedIntQuant) and module.kept]
    assert all(item.values is None for item in kept)  # the memory is given back
    return len(calls)


def test_weights_are_rounded_once_a_step_where_they_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounded_weights(monkeypatch, perturb_quantized=True) == 3
    assert rounded_weights(monkeypatch, perturb_quantized=True, perturb='all') == 6
    assert rounded_weights(monkeypatch) == 6


def scaling(policy: str, where: str) -> Any:
    """A calibrated quantizer's part that gives its scale."""
    layer = quantized(policy).train().conv
    quantizer = layer.weight_quant.tensor_quant
    return (
        quantizer if where == 'weights' else layer.input_quant.fused_activation_quant_proxy.tensor_quant
    ).scaling_impl


@pytest.mark.parametrize('where', ['weights', 'inputs'])
@pytest.mark.parametrize('policy', ['W8A8', 'W4A4'])
def test_a_learned_scale_and_its_gradients_are_those_of_brevitas(policy: str, where: str) -> None:
    part, integers = scaling(policy, where), torch.tensor(7.0)
    minimum = minimum_of(part)
    assert minimum is not None
    assert minimum > 0
    assert is_learned_now(part)
    # Zero, below the minimum, negative: what training may make of it.
    with torch.no_grad():
        values = torch.tensor([0.0, minimum / 2, -minimum / 2, -0.3, 0.3])
        part.value = nn.Parameter(values.view(-1, 1, 1, 1))
    weights = torch.randn(part.value.shape)
    found, expected = learned_scale(part.value, minimum, integers), part(torch.zeros(1), integers)
    assert same_bits(found, expected)
    gradients = [
        torch.autograd.grad((weights * scale).square().sum(), part.value, create_graph=True)[0]
        for scale in (found, expected)
    ]
    assert same_bits(*gradients)
    second = [torch.autograd.grad(gradient.sum(), part.value)[0] for gradient in gradients]
    assert second[0][3:].all()
    assert same_bits(*second)


def test_scales_that_are_made_in_another_way_are_left_to_brevitas() -> None:
    assert minimum_of(scaling('statistics', 'weights')) is None
    part = scaling('W4A4', 'weights')
    part.stats_scaling_impl.restrict_clamp_scaling.restrict_value_impl = PowerOfTwoRestrictValue()
    assert minimum_of(part) is None
    inputs = scaling('W4A4', 'inputs').eval()  # Brevitas divides before it compares with the minimum there
    assert not is_learned_now(inputs)


def test_another_bit_width_is_seen() -> None:
    model, own = quantized('W4A4'), as_in_brevitas(quantized('W4A4'))
    inputs = batches(1)[0]['inputs']
    assert same_bits(model.conv(inputs), own.conv(inputs))
    for layer in (model.conv, own.conv):
        layer.weight_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width.value.fill_(2)
    assert same_bits(model.conv(inputs), own.conv(inputs))
    for layer in (model.conv, own.conv):
        layer.weight_quant.tensor_quant.msb_clamp_bit_width_impl = BitWidthConst(3)
    assert same_bits(model.conv(inputs), own.conv(inputs))
    assert len(own.conv.quant_weight().value.unique()) <= 2**3 * len(own.conv.weight)
