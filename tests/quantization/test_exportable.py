"""Networks whose sizes torch's exporter takes for values, and those that it cannot write: one line, before training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.errors import UserError
from mm_sharp.quantization import QuantizationPolicy, calibrate, export, onnx_graph, quantize
from mm_sharp.quantization.deployment import deployment_constants
from mm_sharp.quantization.export import export_onnx, warn_of_export
from mm_sharp.quantization.onnx_graph import runner
from tests.mmpose_cases import QUIET
from tests.quantized_models import conv, policy
from tests.toys import same_state
from tools import deployment_table

pytestmark = QUIET
HEIGHT, WIDTH = 13, 10


class Codec:
    def __init__(self, input_size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
        self.input_size = input_size


class TopdownPoseEstimator(nn.Module):
    """As the export knows MMPose's: by its name and its codec."""

    def __init__(self, between: Any, channels: int = 3) -> None:
        super().__init__()
        self.first, self.head, self.between = conv(channels, 4), conv(4, 5), between
        self.head.decoder = Codec()
        if channels == 1:
            self.data_preprocessor = ImgDataPreprocessor(mean=[116.0], std=[57.0])

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        maps: Tensor = self.head(self.between(self.first(inputs).relu()))
        return maps


class Fourier(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.fft.fft2(inputs).abs()


def model_of(between: Any, channels: int = 3) -> Any:
    torch.manual_seed(0)
    model = TopdownPoseEstimator(between, channels)
    decoder = model.head.decoder
    quantize(model, QuantizationPolicy.from_config(policy(8, 8, input_size=(WIDTH, HEIGHT))))
    model.head.decoder = decoder  # the layer was replaced
    calibrate(model, [{'inputs': images(4, channels)}])
    return model.eval()


def images(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(count))


SIZES: dict[str, Any] = {
    'of another tensor': lambda x: F.adaptive_avg_pool2d(x, F.avg_pool2d(x, 2).shape[-2:]),
    'that divides nothing': lambda x: F.adaptive_avg_pool2d(x, (5, 3)),
    'that divides all': nn.AdaptiveAvgPool2d((13, 5)),
    'for both sides': nn.AdaptiveAvgPool2d(4),
    'of one side': nn.AdaptiveAvgPool2d((None, 2)),
    'of everything': nn.AdaptiveAvgPool2d(1),
    'larger than the input': nn.AdaptiveAvgPool2d((20, 11)),
}


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.slow
def test_pooling_to_a_size_is_exported(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(SIZES[name])
    file = export_onnx(model, tmp_path / 'model.onnx', 'qcdq', {})
    session = onnxruntime.InferenceSession(str(file))
    for count in (1, 3):  # the batch's size is free
        (found,) = session.run(None, {'input': images(count).numpy()})
        with torch.no_grad():
            expected = model(images(count)).numpy()
        # A rounding flip is a step of the last layer's input; nearly all values have none.
        assert np.mean(np.abs(found - expected) < 1e-5) > 0.99
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert F.adaptive_avg_pool2d is not export._pool


@pytest.mark.parametrize(
    ('sides', 'size'), [((13, 10), (5, 3)), ((7, 7), (7, 3)), ((4, 6), (9, 12)), ((12, 6), (4, 3))]
)
def test_pooling_computes_the_same(sides: tuple[int, int], size: tuple[int, int]) -> None:
    inputs = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(export._pool(inputs, size), F.adaptive_avg_pool2d(inputs, size), rtol=1e-6)


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = model_of(Fourier())
    with pytest.raises(UserError, match=r"cannot write the network as ONNX: between: .*'aten::fft_fft2'") as caught:
        export_onnx(model, tmp_path / 'model.onnx', 'qcdq', {})
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert 'graph(' not in ''.join(capfd.readouterr())


def test_a_graph_that_cannot_be_rewritten_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise KeyError('a name\nthat is not there')

    monkeypatch.setattr(onnx_graph, '_drop_idle', broken)
    with pytest.raises(UserError, match="cannot be rewritten for the target 'generic': KeyError: ") as caught:
        export_onnx(model_of(nn.Identity()), tmp_path / 'model.onnx', 'qcdq', {})
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


def warnings_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(export, 'print_log', lambda message, logger, level: said.append((message, level)))
    warn_of_export(model)
    assert all(level == logging.WARNING and '\n' not in message for message, level in said)
    return [message for message, _ in said]


def test_it_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = warnings_of(model_of(Fourier()), monkeypatch)
    assert message.startswith('This model can be trained and tested, but tools/export.py will refuse it: torch cannot')
    assert 'between: ' in message
    model = model_of(nn.Identity())
    model.head.decoder = None
    (message,) = warnings_of(model, monkeypatch)
    assert 'a TopdownPoseEstimator whose head has a codec can be' in message


def test_what_can_be_exported_is_left_as_it_is_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copy = model_of(nn.AdaptiveAvgPool2d(3)), model_of(nn.AdaptiveAvgPool2d(3))
    assert warnings_of(model.train(), monkeypatch) == []
    assert model.training
    assert same_state(model, copy)
    with torch.no_grad():
        assert torch.equal(model.eval()(images(2)), copy(images(2)))


def test_a_warning_does_not_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise KeyError('a name\nthat is not there')

    monkeypatch.setattr(export, '_write_float', broken)
    (message,) = warnings_of(model_of(nn.Identity()), monkeypatch)
    assert 'tools/export.py will refuse it: KeyError: ' in message


def test_pictures_have_as_many_channels_as_the_preprocessor_has_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(nn.Identity(), channels=1)
    assert warnings_of(model, monkeypatch) == []
    pipeline = [{'type': 'GetBBoxCenterScale'}, {'type': 'TopdownAffine'}]
    constants = deployment_constants(model, pipeline, {})
    assert constants['input'] == {
        'name': 'input', 'width': WIDTH, 'height': HEIGHT, 'channels': 'gray', 'mean': [116.0], 'std': [57.0],
    }  # fmt: skip
    graph = onnx.load(export_onnx(model, tmp_path / 'model.onnx', 'qcdq', constants))
    inputs = images(2, channels=1)
    with torch.no_grad():
        expected = model(inputs).numpy()
    found = runner(graph, 'qcdq')({'input': inputs.numpy()})['heatmaps']
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert {tuple(picture.shape) for picture in deployment_table._noise(model)['inputs']} == {(1, HEIGHT, WIDTH)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(2).transpose(1, 2)
        rows, _ = self.attention(rows, rows, rows, need_weights=False)
        return rows.transpose(1, 2).reshape(inputs.shape)


def test_torchs_attention_is_exported(tmp_path: Path) -> None:
    """In evaluation mode it has a fast way, of an operator that ONNX has not."""
    switch = pytest.importorskip('torch.backends.mha')
    model = model_of(Attention())
    graph = onnx.load(export_onnx(model, tmp_path / 'model.onnx', 'qcdq', {}))
    assert switch.get_fastpath_enabled()
    with torch.no_grad():
        expected = model(images(3)).numpy()
    found = runner(graph, 'qcdq')({'input': images(3).numpy()})['heatmaps']
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = conv(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        maps: Tensor = self.layer(self.layer(inputs).relu())
        return maps


def test_a_layer_that_is_called_twice_runs_in_onnx_runtime(tmp_path: Path) -> None:
    """With LiteHRNet's layers, in which it failed: two DequantizeLinear took the same weights."""
    model = model_of(Twice())
    graph = onnx.load(export_onnx(model, tmp_path / 'model.onnx', 'qcdq', {}))
    stored = {item.name for item in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type == 'DequantizeLinear']
    weights = [node.input[0] for node in nodes if node.input[0] in stored]
    assert len(weights) == len(set(weights)) == 4
    with torch.no_grad():
        expected = model(images(2)).numpy()
    found = runner(graph, 'qcdq')({'input': images(2).numpy()})['heatmaps']
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # ONNX Runtime rounds biases
