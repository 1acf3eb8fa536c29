"""The fused fake quantization against Brevitas's own, and one rounding of the weights a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brevitas.core.quant import IntQuant
from torch import nn
from torch.optim import SGD

from mm_sharp import ESAMOptimWrapper, SAMOptimWrapper
from mm_sharp.quantization.int_quant import FusedIntQuant
from tests.quantized_toys import batches, quantized
from tests.toys import same_bits


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
        if isinstance(module, FusedIntQuant):
            module.__class__ = IntQuant
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
    clamp = torch.clamp

    def counting(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape in weights:
            calls.append(x.shape)
        return clamp(x, *args, **kwargs)

    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.05), rho=0.05, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'clamp', counting)
        model.train_step(batches(1)[0], wrapper)
    kept = [module.kept for module in model.modules() if isinstance(module, FusedIntQuant) and module.kept]
    assert all(item.values is None for item in kept)  # the memory is given back
    return len(calls)


def test_weights_are_rounded_once_a_step_where_they_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounded_weights(monkeypatch, perturb_quantized=True) == 3
    assert rounded_weights(monkeypatch, perturb_quantized=True, perturb='all') == 6
    assert rounded_weights(monkeypatch) == 6
