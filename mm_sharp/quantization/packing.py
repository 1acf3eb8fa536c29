"""Weights of at most 4 bits, two in a byte: ONNX's types INT4 and UINT4, of opset 21.

A Cast to 8 bits stands between them and their DequantizeLinear. ONNX Runtime and OpenVINO compute it once, when they
load the file, and then have the graph of the unpacked file, with as many convolutions in integers. DequantizeLinear
takes packed weights as well, but then both runtimes compute all convolutions in float.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import onnxoptimizer  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter
from torch import nn

from mm_sharp.errors import UserError

from .record import quantized_record

OPSET, IR_VERSION = 21, 10  # the first with 4-bit types in all operators
# Of 8 bits: the packed type, and what fits into it.
_PACKED = {TensorProto.INT8: (TensorProto.INT4, -8, 7), TensorProto.UINT8: (TensorProto.UINT4, 0, 15)}


def check_packable(model: nn.Module) -> None:
    """Refuse, with a UserError, models without weights that can be packed, and those for TensorRT."""
    record = quantized_record(model)
    if record.policy.target == 'tensorrt':
        raise UserError(
            "packed=True is not for target='tensorrt', whose convolutions take integers of 8 bits on both sides. "
            'Leave out --packed'
        )
    bits = {layer.policy.weight_bit_width for layer in record.quantized if layer.policy}
    if not any(width <= 4 for width in bits):
        raise UserError(
            f'packed=True changes nothing: it stores weights of at most 4 bits, and the model has '
            f'{", ".join(map(str, sorted(bits)))}. Leave out --packed, or train with fewer, as weight_bit_width=4'
        )


def pack_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a tidied graph whose integer weights take half a byte each where they fit; their values stay."""
    converted = version_converter.convert_version(model, OPSET)  # it makes constants of some attributes
    converted = onnxoptimizer.optimize(converted, ['extract_constant_to_initializer'])
    converted.ir_version = IR_VERSION
    graph = converted.graph
    del graph.value_info[:]  # the converter's: the shapes of all that is in between
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == 'DequantizeLinear':
            readers[node.input[0]].append(node)
    casts = []
    for item in graph.initializer:
        kind, low, high = _PACKED.get(item.data_type, (0, 0, 0))
        if item.name not in readers or not kind:
            continue
        values = numpy_helper.to_array(item)
        if values.min() < low or values.max() > high:
            continue
        wide, unpacked = item.data_type, f'{item.name}/unpacked'
        casts.append(helper.make_node('Cast', [item.name], [unpacked], name=f'{item.name}/unpack', to=wide))
        for node in readers[item.name]:
            node.input[0] = unpacked
        item.data_type, item.raw_data = kind, _two_in_a_byte(values).tobytes()
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return converted


def _two_in_a_byte(values: NDArray[Any]) -> NDArray[Any]:
    """In order, the first of each two in the lower half of the byte; an odd last one has zeros above it."""
    halves = values.reshape(-1).astype(np.uint8) & 15
    return halves[::2] | np.pad(halves[1::2], (0, halves.size % 2)) << 4
