"""A graph in the form that ONNX Runtime computes in integers: for the target ``'onnxruntime'``. Its values stay equal.

ONNX Runtime joins DequantizeLinear, an operator and QuantizeLinear to one operator in integers, if integers before and
behind are of one type, on x86 uint8 (``core/optimizer/qdq_transformer`` of its source; ``docs/deployment.md``).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .deconvolution import replace_deconvolutions, store
from .onnx_graph import shapes_of

_DOMAIN = 'com.microsoft'


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a tidied graph, in place, and return it."""
    shapes = shapes_of(model, 2)
    _unsign(model.graph)
    _move_clips(model.graph)
    replace_deconvolutions(model.graph, shapes)
    if _join_silus(model.graph):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    used = {name for node in model.graph.node for name in node.input}
    for item in [item for item in model.graph.initializer if item.name not in used]:
        model.graph.initializer.remove(item)
    return model


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
    moved: list[tuple[onnx.NodeProto, onnx.NodeProto | None]] = []
    for quantize in (node for node in graph.node if node.op_type == 'QuantizeLinear'):
        clip = made.get(quantize.input[0])
        if clip is None or clip.op_type != 'Clip' or users[clip.output[0]] > 1 or quantize.input[2] not in stored:
            continue
        scale, zero_point = (stored[name] for name in quantize.input[1:3])
        if zero_point.dtype != np.uint8 or zero_point != 0 or stored[clip.input[1]] > 0:
            continue
        top = np.rint(stored[clip.input[2]] / scale)
        quantize.input[0] = clip.input[0]
        if top >= 255:
            moved.append((clip, None))
            continue
        inner = f'{quantize.output[0]}/unclipped'
        limits = [store(graph, f'{clip.name}/{side}', np.uint8(value)) for side, value in (('low', 0), ('high', top))]
        behind = helper.make_node('Clip', [inner, *limits], [quantize.output[0]], name=f'{clip.name}/integers')
        quantize.output[0] = inner
        moved.append((clip, behind))
    for clip, behind in moved:
        graph.node.remove(clip)
        if behind is not None:
            position = next(i for i, node in enumerate(graph.node) if behind.input[0] in node.output)
            graph.node.insert(position + 1, behind)


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
                sigmoid.op_type = 'unused'
    for node in [node for node in graph.node if node.op_type == 'unused']:
        graph.node.remove(node)
    return found
