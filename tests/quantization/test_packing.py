"""Weights of 4 bits, two in a byte: the file's size, the integers, and what the runtimes compute of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mm_sharp.errors import UserError
from mm_sharp.quantization import quantized_model
from mm_sharp.quantization.export import export_onnx
from mm_sharp.quantization.latency import onnxruntime_convolutions, openvino_convolutions
from mm_sharp.quantization.onnx_graph import activation_points
from mm_sharp.quantization.packing import check_packable, pack_weights
from tests.mmpose_cases import QUIET
from tests.quantized_models import RTMPOSE, SIMCC, Toy, conv, images, policy, to_read

pytestmark = QUIET
HALVES = {TensorProto.INT4: np.int8, TensorProto.UINT4: np.uint8}


def unpacked(item: onnx.TensorProto) -> np.ndarray:
    """Integers of a stored tensor, by the standard: the first in the low half of a byte."""
    if item.data_type not in HALVES:
        return numpy_helper.to_array(item)
    halves = [half for byte in item.raw_data for half in (byte % 16, byte // 16)][: np.prod(item.dims, dtype=int)]
    signed = [half - 16 if half > 7 and item.data_type == TensorProto.INT4 else half for half in halves]
    return np.array(signed, HALVES[item.data_type]).reshape(item.dims)


def run(model: onnx.ModelProto, inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run(None, {'input': inputs})  # type: ignore[no-any-return]


@pytest.fixture(scope='module', params=[SIMCC, pytest.param(RTMPOSE, marks=pytest.mark.slow)], ids=lambda c: c.name)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same W4A8 model in a byte for each weight, and packed; W4A4: ``test_export_tool.py``."""
    folder = tmp_path_factory.mktemp('packed')
    wide, packed = folder / 'wide.onnx', folder / 'packed.onnx'
    export_onnx(to_read(request.param, act=8, target='onnxruntime'), wide, 'qcdq', {})
    onnx.save(pack_weights(onnx.load(wide)), packed)
    return wide, packed


@pytest.mark.slow
def test_packed_files_have_the_same_integers_in_half_the_bytes(files: tuple[Path, Path]) -> None:
    wide, packed = (onnx.load(file) for file in files)
    before, after = ({item.name: item for item in model.graph.initializer} for model in (wide, packed))
    weights = [n.input[0] for n in wide.graph.node if n.op_type == 'DequantizeLinear' and n.input[0] in before]
    few = [name for name in weights if np.abs(unpacked(before[name]).astype(int)).max() <= 8]
    assert 0 < len(few) < len(weights)  # the first layer and RTMPose's last ones have 8 bits
    assert {name for name in after if after[name].data_type in HALVES} == set(few)
    for name in weights:
        assert np.array_equal(unpacked(after[name]), unpacked(before[name]))
    sizes = {name: np.prod(before[name].dims, dtype=int) for name in few}
    assert all(len(after[name].raw_data) == (size + 1) // 2 for name, size in sizes.items())
    assert {node.op_type for node in packed.graph.node} == {node.op_type for node in wide.graph.node}
    # A Cast for each is all that the file has in addition, the converter's few shapes aside.
    casts = [node for node in packed.graph.node if node.name.endswith('/unpack')]
    added = sum(2 * len(cast.SerializeToString()) for cast in casts)
    saved = files[0].stat().st_size - files[1].stat().st_size
    assert sum(size // 2 for size in sizes.values()) - added - 1000 < saved < sum(size // 2 for size in sizes.values())


@pytest.mark.slow
def test_packed_files_compute_the_same(files: tuple[Path, Path]) -> None:
    """In ONNX Runtime bit for bit, and as many convolutions in integers; every quantizer is where it was."""
    wide, packed = (onnx.load(file) for file in files)
    inputs = images(2, seed=3).numpy()
    for one, other in zip(run(wide, inputs), run(packed, inputs), strict=True):
        assert np.array_equal(one, other)
    assert activation_points(wide) == activation_points(packed)


@pytest.mark.slow
def test_convolutions_of_packed_weights_stay_in_integers(files: tuple[Path, Path]) -> None:
    before, after = (onnxruntime_convolutions(file) for file in files)
    assert before == after
    assert before[0] > 10


@pytest.mark.slow
def test_openvino_computes_convolutions_of_packed_weights_in_integers(files: tuple[Path, Path]) -> None:
    pytest.importorskip('openvino')
    assert openvino_convolutions(files[0]) == openvino_convolutions(files[1])


@pytest.mark.parametrize('kind', [np.int8, np.uint8])
@pytest.mark.parametrize('low_high', [(0, 7), (-8, 7), (0, 15), (0, 16), (-9, 0)])
def test_what_fits_is_packed_odd_numbers_too(kind: Any, low_high: tuple[int, int]) -> None:
    if kind is np.uint8 and low_high[0] < 0:
        low_high = (128, 255)
    weights = np.random.default_rng(0).integers(*low_high, (5, 3), kind, endpoint=True)
    weights.flat[:2] = low_high
    nodes = [
        helper.make_node('DequantizeLinear', ['weights', 'scales', 'zeros'], ['floats'], axis=0),
        helper.make_node('MatMul', ['floats', 'input'], ['output']),
    ]
    scales, zeros = np.linspace(0.1, 0.5, 5, dtype=np.float32), np.arange(5).astype(kind)
    stored = {'weights': weights, 'scales': scales, 'zeros': zeros}
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [n, 2]) for name, n in (('input', 3), ('output', 5))
    ]
    graph = helper.make_graph(
        nodes, 'g', kinds[:1], kinds[1:], [numpy_helper.from_array(value, name) for name, value in stored.items()]
    )
    packed = pack_weights(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8))
    onnx.checker.check_model(packed, full_check=True)
    (item,) = (item for item in packed.graph.initializer if item.name == 'weights')
    allowed = (-8, 7) if kind is np.int8 else (0, 15)
    assert (item.data_type in HALVES) is (allowed[0] <= low_high[0] and low_high[1] <= allowed[1])
    assert np.array_equal(unpacked(item), weights)
    inputs = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)
    expected = (weights.astype(np.float32) - np.arange(5)[:, None]) * scales[:, None] @ inputs
    assert np.allclose(run(packed, inputs)[0], expected, atol=1e-5)


def test_models_without_such_weights_are_refused(tmp_path: Path) -> None:
    def model(weight: int, target: str = 'generic') -> Any:
        toy = Toy(lambda net, inputs: net.second(net.first(inputs)), first=conv(3, 4), second=conv(4, 2))
        return quantized_model(toy, policy(weight, 8, target=target, input_size=(8, 8), last_layers='same'))

    check_packable(model(4))
    with pytest.raises(UserError, match='packed=True changes nothing: it stores weights of at most 4 bits'):
        check_packable(model(8))
    with pytest.raises(UserError, match="packed=True is not for target='tensorrt'"):
        check_packable(model(4, 'tensorrt'))
    with pytest.raises(ValueError, match="packed=True is not allowed with format='qonnx'"):
        export_onnx(model(4), tmp_path / 'x.onnx', 'qonnx', {}, packed=True)
