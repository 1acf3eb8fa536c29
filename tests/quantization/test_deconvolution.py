"""Deconvolutions of exported graphs as convolutions, against ONNX Runtime's own deconvolution."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip('onnx', reason='needs the extra: pip install mm_sharp[quant]')
onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra: pip install mm_sharp[quant]')

from mm_sharp.quantization.onnx_runtime import replace_deconvolutions  # noqa: E402

CHANNELS, OUTPUTS, HEIGHT, WIDTH = 3, 2, 5, 4


def graph() -> onnx.ModelProto:
    """A deconvolution of integers by 4x4 pixels with stride 2, a ReLU, and a quantizer behind it."""
    draws = np.random.default_rng(0)
    stored = {
        'integers': draws.integers(-127, 128, (CHANNELS, OUTPUTS, 4, 4)).astype(np.int8),
        'scales': np.array([0.02, 0.03], np.float32),
        'zeros': np.zeros(OUTPUTS, np.int8),
        'bias': np.array([0.5, -0.5], np.float32),
        'scale': np.float32(0.1),
        'zero': np.uint8(0),
    }
    node = onnx.helper.make_node
    nodes = [
        node('DequantizeLinear', ['integers', 'scales', 'zeros'], ['weights'], axis=1),
        node(
            'ConvTranspose',
            ['x', 'weights', 'bias'],
            ['y'],
            name='up',
            kernel_shape=[4, 4],
            strides=[2, 2],
            pads=[1] * 4,
        ),
        node('Relu', ['y'], ['r']),
        node('QuantizeLinear', ['r', 'scale', 'zero'], ['q'], name='quantize'),
        node('DequantizeLinear', ['q', 'scale', 'zero'], ['out']),
    ]
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        'graph',
        [info('x', onnx.TensorProto.FLOAT, ['batch', CHANNELS, HEIGHT, WIDTH])],
        [info('out', onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)


def outputs(model: onnx.ModelProto, picture: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {'x': picture})
    return np.asarray(found)


@pytest.mark.parametrize('batch', [1, 3])
def test_the_convolution_gives_the_deconvolutions_integers(batch: int) -> None:
    picture = np.random.default_rng(1).normal(size=(batch, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)
    before, model = outputs(graph(), picture), graph()
    replace_deconvolutions(model.graph, {'y': (1, OUTPUTS, 2 * HEIGHT, 2 * WIDTH)})
    assert {node.op_type for node in model.graph.node} >= {'Conv', 'Slice', 'Transpose'}
    assert 'ConvTranspose' not in {node.op_type for node in model.graph.node}
    after = outputs(model, picture)
    assert after.shape == before.shape == (batch, OUTPUTS, 2 * HEIGHT, 2 * WIDTH)
    # Sums in another order: at most a step of the quantizer apart, and hardly anywhere.
    assert np.abs(after - before).max() < 0.11
    assert (after == before).mean() > 0.99


def test_a_layer_that_is_called_twice_has_constants_of_two_names() -> None:
    """Of both calls, scales, zero points and biases are the same constants."""
    model = graph()
    for node in list(model.graph.node):
        again = model.graph.node.add()
        again.CopyFrom(node)
        again.name = f'{node.name or node.op_type}/again'
        again.output[0] += '/again'
        for i, name in enumerate(node.input):
            if name in {made for first in graph().graph.node for made in first.output}:
                again.input[i] = f'{name}/again'
    shape = (1, OUTPUTS, 2 * HEIGHT, 2 * WIDTH)
    replace_deconvolutions(model.graph, {'y': shape, 'y/again': shape})
    names = [item.name for item in model.graph.initializer]
    assert len(names) == len(set(names))
    assert [node.op_type for node in model.graph.node].count('Conv') == 2


def test_a_deconvolution_with_weights_in_float_stays() -> None:
    model = graph()
    del model.graph.node[0]
    model.graph.node[0].input[1] = 'integers'
    before = onnx.ModelProto.FromString(model.SerializeToString())
    replace_deconvolutions(model.graph, {'y': (1, OUTPUTS, 2 * HEIGHT, 2 * WIDTH)})
    assert model == before


def test_a_deconvolution_of_unknown_size_stays() -> None:
    model = graph()
    replace_deconvolutions(model.graph, {'y': (0, OUTPUTS, 0, 0)})
    assert model == graph()
