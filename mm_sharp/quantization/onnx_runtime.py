"""A graph in the form that ONNX Runtime computes in integers: for the target ``'onnxruntime'``. Its values stay equal.

ONNX Runtime joins DequantizeLinear, an operator and QuantizeLinear to one operator in integers, if integers before and
behind are of one type, on x86 uint8 (``core/optimizer/qdq_transformer`` of its source; ``docs/deployment.md``).

It has no deconvolution in integers. One by 4x4 pixels with stride 2 makes a picture of twice the size. Its rows 2i see
rows i - 1 and i of the input, and its rows 2i + 1 see i and i + 1. So one convolution by 2x2 pixels, padded by one,
makes four pictures of (H + 1, W + 1); of each a first or last row and column are left out, and they are interleaved.
The products and sums are the same. Interleaving moves integers only, since it stands behind the quantizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .onnx_graph import shapes_of, without_unused

_DOMAIN = 'com.microsoft'
_TAPS = ([3, 1], [2, 0])  # of the rows 2i and 2i + 1: the kernel's rows, for the input's in their order
_WANTED: dict[str, object] = {'kernel_shape': [4, 4], 'strides': [2, 2], 'pads': [1] * 4}
_PLAIN: dict[str, object] = {'group': 1, 'dilations': [1, 1], 'output_padding': [0, 0]}


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a tidied graph; what is given changes."""
    shapes = shapes_of(model, 2)
    _unsign(model.graph)
    _move_clips(model.graph)
    replace_deconvolutions(model.graph, shapes)
    if _join_silus(model.graph):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return without_unused(model)


def _unsign(graph: onnx.GraphProto) -> None:
    """Activations in uint8: integers from -128 to 127 become those from 0 to 255, with 128 as the zero point."""
    stored = {item.name: item for item in graph.initializer}
    int8 = {name for name, item in stored.items() if item.data_type == onnx.TensorProto.INT8}
    for node in graph.node:
        if node.op_type == 'QuantizeLinear' or (node.op_type == 'DequantizeLinear' and node.input[0] not in stored):
            zero_point = numpy_helper.to_array(stored[node.input[2]])
            if zero_point.dtype == np.int8:
                node.input[2] = store(graph, f'{node.name}/uint8', (zero_point.astype(np.int16) + 128).astype(np.uint8))
        elif node.op_type == 'Clip' and node.input[1] in int8:  # of fewer bits
            for i in (1, 2):
                limit = numpy_helper.to_array(stored[node.input[i]]).astype(np.int16) + 128
                node.input[i] = store(graph, f'{node.name}/uint8_{i}', limit.astype(np.uint8))


def _move_clips(graph: onnx.GraphProto) -> None:
    """ReLU6 in integers, behind the quantizer: round(min(x, 6) / scale) = min(round(x / scale), round(6 / scale)).

    In front of it, it would keep the convolution in float. Where the integers end at its limit, it is left out.
    """
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)
    made = {node.output[0]: node for node in graph.node}
    for quantize in [node for node in graph.node if node.op_type == 'QuantizeLinear']:
        clip = made.get(quantize.input[0])
        if clip is None or clip.op_type != 'Clip' or users[clip.output[0]] > 1 or quantize.input[2] not in stored:
            continue
        scale, zero_point = (stored[name] for name in quantize.input[1:3])
        limits = _limits(clip, stored)
        if zero_point.dtype != np.uint8 or zero_point != 0 or limits is None or not limits[0] <= 0 <= limits[1]:
            continue
        quantize.input[0] = clip.input[0]
        top = np.rint(limits[1] / scale)
        if top < 255:
            result, inner = quantize.output[0], f'{quantize.output[0]}/unclipped'
            ends = [store(graph, f'{clip.name}/{end}', np.uint8(value)) for end, value in (('low', 0), ('high', top))]
            quantize.output[0] = inner
            behind = helper.make_node('Clip', [inner, *ends], [result], name=f'{clip.name}/integers')
            graph.node.insert(list(graph.node).index(quantize) + 1, behind)
        graph.node.remove(clip)


def _limits(clip: onnx.NodeProto, stored: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """A Clip's limits, infinite where it has none (``clamp(min=0)``); None if they are not constant."""
    low, high = [*clip.input[1:], '', ''][:2]
    if not {low, high} <= {'', *stored}:
        return None
    infinity: Any = np.float32(np.inf)
    return stored.get(low, -infinity), stored.get(high, infinity)


def _join_silus(graph: onnx.GraphProto) -> bool:
    """x * sigmoid(x) as one operator, QuickGelu: ONNX Runtime makes it of the two in float models, but not between
    quantizers. Whether there was any."""
    users = Counter(name for node in graph.node for name in node.input)
    sigmoids = {node.output[0]: node for node in graph.node if node.op_type == 'Sigmoid'}
    found = False
    for node in graph.node:
        parts = list(node.input)
        for sigmoid in (sigmoids[name] for name in parts if name in sigmoids):
            if node.op_type == 'Mul' and sigmoid.input[0] in parts and users[sigmoid.output[0]] == 1:
                node.op_type, node.domain, found = 'QuickGelu', _DOMAIN, True
                del node.input[:]
                node.input.append(sigmoid.input[0])
                node.attribute.append(helper.make_attribute('alpha', 1.0))
    return found


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
    for kind, names, kept in (('scale', weights.input, 1), ('zero_point', weights.input, 2), ('bias', node.input, 2)):
        value = numpy_helper.to_array(stored[names[kept]]) if kept < len(names) else np.zeros(())
        if value.ndim:
            # Named after the node: a layer that is called twice has one scale and one bias.
            names[kept] = store(graph, f'{node.name}/{kind}', np.tile(value, 4))
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
