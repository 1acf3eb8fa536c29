"""Deconvolutions of exported graphs as convolutions: ONNX Runtime has none in integers.

A deconvolution by 4x4 pixels with stride 2 makes a picture of twice the size. Its rows 2i see rows i - 1 and i of the
input, and its rows 2i + 1 see i and i + 1. So one convolution by 2x2 pixels, padded by one, makes four pictures of
(H + 1, W + 1); of each a first or last row and column are left out, and they are interleaved. The products and sums are
the same. Interleaving moves integers only, since it stands behind the quantizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

_TAPS = ([3, 1], [2, 0])  # of the rows 2i and 2i + 1: the kernel's rows, for the input's in their order
_WANTED: dict[str, object] = {'kernel_shape': [4, 4], 'strides': [2, 2], 'pads': [1] * 4}
_PLAIN: dict[str, object] = {'group': 1, 'dilations': [1, 1], 'output_padding': [0, 0]}


def replace_deconvolutions(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace, in place, those that such a convolution can stand for; ``shapes`` are those of the graph's tensors."""
    stored = {item.name: item for item in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    for node in [node for node in graph.node if node.op_type == 'ConvTranspose' and _doubles(node)]:
        weights, quantize = made.get(node.input[1]), _quantizer(graph, node)
        shape = list(shapes[node.output[0]])
        if weights is None or weights.op_type != 'DequantizeLinear':
            continue  # left in float by the policy
        # Behind ShuffleNetV2's reshaping ONNX does not know the picture's size: then the deconvolution stays.
        if quantize is None or not all(shape[1:]):
            continue
        _convolve(graph, node, weights, stored)
        _interleave(graph, quantize, shape)


def _doubles(node: onnx.NodeProto) -> bool:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return all(found.get(k) == v for k, v in _WANTED.items()) and all(found.get(k, v) == v for k, v in _PLAIN.items())


def _quantizer(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The QuantizeLinear that takes a node's output, at most a ReLU between, and is all that takes it."""
    users = Counter(name for user in graph.node for name in user.input)
    while users[node.output[0]] == 1 and node.op_type in ('ConvTranspose', 'Relu'):
        node = next(user for user in graph.node if node.output[0] in user.input)
    return node if node.op_type == 'QuantizeLinear' else None


def _convolve(
    graph: onnx.GraphProto, node: onnx.NodeProto, weights: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]
) -> None:
    integers = numpy_helper.to_array(stored[weights.input[0]])  # (inputs, outputs, 4, 4)
    parts = [integers[:, :, rows][:, :, :, columns] for rows in _TAPS for columns in _TAPS]
    kernel = np.ascontiguousarray(np.concatenate(parts, 1).swapaxes(0, 1))
    weights.input[0] = store(graph, f'{node.name}/kernel', kernel)
    for names, kept in ((weights.input, 1), (weights.input, 2), (node.input, 2)):  # scale, zero point and bias
        value = numpy_helper.to_array(stored[names[kept]]) if kept < len(names) else np.zeros(())
        if value.ndim:
            names[kept] = store(graph, f'{names[kept]}/four', np.tile(value, 4))
    for attribute in weights.attribute:
        attribute.i = 0  # the axis of the outputs
    node.op_type = 'Conv'
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(k, v) for k, v in {'kernel_shape': [2, 2], 'pads': [1] * 4}.items())


def _interleave(graph: onnx.GraphProto, quantize: onnx.NodeProto, shape: Sequence[int]) -> None:
    """Behind the quantizer: one picture of (2H, 2W) out of four of (H + 1, W + 1)."""
    name, result = quantize.name, quantize.output[0]
    channels, height, width = shape[1], shape[2] // 2, shape[3] // 2
    quantize.output[0] = f'{name}/four'

    def constant(key: str, value: Sequence[int]) -> str:
        return store(graph, f'{name}/{key}', np.array(value, np.int64))

    nodes, axes = [], constant('axes', [1, 2, 3])
    for number, (row, column) in enumerate((row, column) for row in (0, 1) for column in (0, 1)):
        first = constant(f'first_{number}', [channels * number, row, column])
        end = constant(f'end_{number}', [channels * (number + 1), height + row, width + column])
        nodes.append(helper.make_node('Slice', [f'{name}/four', first, end, axes], [f'{name}/{number}']))
    flat = constant('flat', [-1, 2, 2, channels, height, width])
    whole = constant('whole', [-1, channels, 2 * height, 2 * width])
    pieces = [node.output[0] for node in nodes]
    nodes += [
        helper.make_node('Concat', pieces, [f'{name}/side'], axis=1),
        helper.make_node('Reshape', [f'{name}/side', flat], [f'{name}/pairs']),
        helper.make_node('Transpose', [f'{name}/pairs'], [f'{name}/mixed'], perm=[0, 3, 4, 1, 5, 2]),
        helper.make_node('Reshape', [f'{name}/mixed', whole], [result]),
    ]
    position = list(graph.node).index(quantize)
    for offset, node in enumerate(nodes, 1):
        node.name = f'{name}/interleave_{offset}'
        graph.node.insert(position + offset, node)


def store(graph: onnx.GraphProto, name: str, value: object) -> str:
    """Add a constant to a graph; returns its name."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name
