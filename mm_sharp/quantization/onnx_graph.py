"""Exported graphs: the exporter's leftovers, the places where activations are quantized, and how graphs are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxoptimizer  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]
FORCED = '/forced'
# What may stand between QuantizeLinear and DequantizeLinear.
_OF_INTEGERS = ('Clip', 'Slice', 'Concat', 'Reshape', 'Transpose', 'DequantizeLinear')


def tidy(model: onnx.ModelProto, outputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """A graph without the exporter's leftovers, since compilers want nothing in it but the network.

    - Weights are constants, not inputs that a caller could replace.
    - Integer weights reach their DequantizeLinear directly, and not by a Clip that changes none of them: only then does
      OpenVINO compute a convolution in integers. Nothing is cast to the type that it has.
    - Every DequantizeLinear has a zero point of its own, and integer weights of its own where a layer is called twice:
      ONNX Runtime 1.32 fails on what is shared.
    - ``torch.flatten`` and ``view`` became Shape, Slice or Gather, Concat and Reshape, since the batch's size is free.
      The new shape becomes a constant, with -1 for the size that depends on the batch.
    - Outputs have the shapes that are given, which the exporter loses behind operators that it does not know.
    """
    graph = model.graph
    del graph.input[1:]
    stored = {item.name: item for item in graph.initializer}
    _drop_idle(model, stored)
    small, large = shapes_of(model, 2), shapes_of(model, 3)
    weights: set[str] = set()
    for node in graph.node:
        if node.op_type == 'DequantizeLinear' and node.input[2] in stored:
            _copy_constant(graph, stored, node, 2, 'zero_point')
            if node.input[0] in weights:
                _copy_constant(graph, stored, node, 0, 'weights')
            elif node.input[0] in stored:
                weights.add(node.input[0])
        if node.op_type == 'Reshape' and node.input[1] not in stored:
            pairs = zip(small.get(node.output[0], ()), large.get(node.output[0], ()), strict=True)
            shape = [a if a == b != 0 else -1 for a, b in pairs]  # 0 is a size that is not known
            if shape.count(-1) == 1:
                node.input[1] = f'{node.name}/shape'
                graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), node.input[1]))
    for output in graph.output:
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, ['batch', *outputs[output.name][1:]]))
    return without_unused(model)


def without_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without nodes and constants that nothing uses."""
    return onnxoptimizer.optimize(model, ['eliminate_deadend', 'eliminate_unused_initializer'])


def _copy_constant(
    graph: onnx.GraphProto, stored: Mapping[str, onnx.TensorProto], node: onnx.NodeProto, position: int, name: str
) -> None:
    copy = graph.initializer.add()
    copy.CopyFrom(stored[node.input[position]])
    copy.name = node.input[position] = f'{node.name}/{name}'


def _drop_idle(model: onnx.ModelProto, stored: Mapping[str, onnx.TensorProto]) -> None:
    """Have readers of a Clip that does not change a constant, or of a Cast of floats to float, read its input."""
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    floats = {value.name for value in inferred if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    sources: dict[str, str] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = sources.get(name, name)
        if node.op_type == 'Cast' and node.attribute[0].i == onnx.TensorProto.FLOAT and node.input[0] in floats:
            sources[node.output[0]] = node.input[0]
        if node.op_type == 'Clip' and len(node.input) == 3 and all(name in stored for name in node.input):
            values, low, high = (numpy_helper.to_array(stored[name]) for name in node.input)
            if values.min() >= low and values.max() <= high:
                sources[node.output[0]] = node.input[0]


def shapes_of(model: onnx.ModelProto, batch: int) -> dict[str, list[int]]:
    """The shape of every tensor for one size of the batch."""
    sized = _with_batch(model, batch)
    for node in sized.graph.node:
        if node.op_type == 'Quant':  # which ONNX does not know, and which changes no shape
            node.op_type, node.domain = 'Identity', ''
            del node.input[1:], node.attribute[:]
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    values = (*graph.value_info, *graph.output)
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def _with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose inputs are of one size of the batch, and whose other shapes are to be inferred."""
    copy = deepcopy(model)
    for value in copy.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in copy.graph.output:
        value.type.tensor_type.ClearField('shape')
    del copy.graph.value_info[:]
    return copy


@dataclass(frozen=True)
class ActivationPoint:
    """A place where a graph quantizes an activation."""

    node: str  # name of the node, which has the layer's name in it
    tensor: str  # name of the quantized activation: integers times the scale, in float
    scale: float
    zero_point: float


def activation_points(model: onnx.ModelProto) -> list[ActivationPoint]:
    """The places where a graph quantizes activations, in the order of its nodes, which is that of the forward pass."""
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    users = {name: node for node in model.graph.node if node.op_type in _OF_INTEGERS for name in node.input}
    points = []
    for node in model.graph.node:
        if node.op_type in ('QuantizeLinear', 'Quant') and node.input[0] not in stored:  # weights are
            last = node
            while last.op_type not in ('DequantizeLinear', 'Quant'):
                last = users[last.output[0]]
            scale, zero_point = (float(stored[name]) for name in node.input[1:3])
            points.append(ActivationPoint(node.name, last.output[0], scale, zero_point))
    return points


def with_inputs(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """A copy of a graph in which tensors, of these shapes, come from outside: by their names and :data:`FORCED`."""
    copy = deepcopy(model)
    for node in copy.graph.node:
        for i, name in enumerate(node.input):
            if name in shapes:
                node.input[i] = name + FORCED
    for name, shape in shapes.items():
        free = ['batch', *shape[1:]]
        copy.graph.input.append(helper.make_tensor_value_info(name + FORCED, onnx.TensorProto.FLOAT, free))
    return copy


def runner(model: onnx.ModelProto, file_format: str, tensors: Sequence[str] = (), *, optimized: bool = True) -> Run:
    """A function from a graph's inputs to its outputs and inner ``tensors``, all by name; batches of any size.

    ``'qonnx'`` runs in the package ``qonnx``, which is slow, other formats in ONNX Runtime, by default ``optimized``.
    """
    names = [*(output.name for output in model.graph.output), *tensors]
    if file_format == 'qonnx':
        return lambda inputs: _run_qonnx(model, names, inputs)
    import onnxruntime

    copy = deepcopy(model)
    copy.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about what is optimized, and how
    # On x86 processors without VNNI instructions, products of 8-bit integers overflow otherwise.
    options.add_session_config_entry('session.x64quantprecision', '1')
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _run_qonnx(model: onnx.ModelProto, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """The reference semantics of ``Quant``: every node is a session of its own, and all shapes must be known."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    sized = ModelWrapper(_with_batch(model, len(inputs['input']))).transform(InferShapes())
    made = execute_onnx(sized, dict(inputs), return_full_exec_context=True)
    return {name: made[name] for name in names}
