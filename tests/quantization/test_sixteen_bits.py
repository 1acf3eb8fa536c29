"""Inputs of 16 bits: their integers, training, per-sample losses, and where they cannot go."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from mm_sharp.analysis.post_training.policies import read_policy
from mm_sharp.errors import UnsupportedError
from mm_sharp.quantization import QuantizationPolicy, calibrate, quantize, quantized_model
from mm_sharp.quantization.export import export_onnx, warn_of_export
from tests.mmpose_cases import QUIET
from tests.quantized_models import SIMCC, Toy, conv, float_model, images, samples
from tests.quantized_toys import ResidualToy, batches, slow_sgd
from tests.toys import make
from tests.wrappers import build

pytestmark = QUIET
W8A16 = dict(weight_bit_width=8, act_bit_width=16, scale_init='max', first_layers='same', last_layers='same')


def toy() -> nn.Module:
    model = Toy(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6), b=conv(6, 2))
    quantized = quantized_model(model, {**W8A16, 'input_size': (8, 8)}).eval()
    calibrate(quantized, [{'inputs': images(4, 0, (8, 8))}])
    return quantized


def test_integers_are_of_16_bits_signed_and_unsigned() -> None:
    model = toy().requires_grad_(False)
    far, near = 1e3 * images(4, 1, (8, 8)), 0.3 * images(4, 2, (8, 8)).abs()
    for layer, inputs, low, high in (
        (model.a, far, -(2**15), 2**15 - 1),
        (model.b, far.repeat(1, 2, 1, 1).relu(), 0, 2**16 - 1),
    ):
        quantized = layer.input_quant(inputs)
        integers = torch.round(quantized.value / quantized.scale)
        assert (float(integers.min()), float(integers.max())) == (low, high)
        assert quantized.bit_width == 16
        within = near if layer is model.a else near.repeat(1, 2, 1, 1)
        error = layer.input_quant(within).value - within
        assert float(error.abs().max()) <= 0.501 * float(quantized.scale)


def test_the_fragment_gives_all_layers_16_bit_inputs() -> None:
    model = quantize(float_model(SIMCC), QuantizationPolicy.from_config(read_policy('w8a16')))
    bits = {(layer.policy.weight_bit_width, layer.policy.act_bit_width) for layer in model.quantization.quantized}
    assert bits == {(8, 16)}
    assert set(model.quantization_layout[:, 1].tolist()) == {16}


@pytest.mark.parametrize('name', ['sam', 'esam', 'ausam'])
def test_it_is_trained_by_sharpness_aware_methods(name: str) -> None:
    model = make(ResidualToy, seed=0)
    quantize(model, QuantizationPolicy.from_config({**W8A16, 'input_size': (6, 6)}))
    calibrate(model, batches(2, seed=5))
    model.train()
    before = copy.deepcopy(dict(model.named_parameters()))
    wrapper = build(name, model, slow_sgd(model))
    losses = [model.train_step(batch, wrapper)['loss'].item() for batch in batches(1, seed=3) * 12]
    assert losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if 'input_quant' in n)


def test_qcdq_refuses_it_in_one_line(tmp_path: Path) -> None:
    model = quantize(float_model(SIMCC), QuantizationPolicy.from_config(W8A16)).eval()
    calibrate(model, samples(1))
    with pytest.raises(UnsupportedError, match=r'26 layers .*16 bits, which QCDQ cannot.*--format qonnx'):
        export_onnx(model, tmp_path / 'x.onnx', 'qcdq', {})
    assert not list(tmp_path.iterdir())
    with patch('mm_sharp.quantization.export.print_log') as log:
        warn_of_export(model)
    assert 'can be trained and tested, but tools/export.py will refuse it: 26 layers' in log.call_args.args[0]
