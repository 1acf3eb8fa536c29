"""An exported graph without the exporter's leftovers, for compilers that want nothing in it but the network (ours).

- Parameters of equal values (biases of 0, say) are stored once and reach their other names through Identity: each is
  stored under its own name. So is the zero point of every DequantizeLinear: ONNX Runtime (1.32) fails on weights that
  share one when it makes them unsigned, as it should on processors where products of int8 overflow.
- ``torch.flatten`` and ``view`` with a free batch size become Shape, Slice or Gather, Concat and Reshape. ONNX says the
  same in a constant: 0 is a size that stays, -1 what is left.
- What nothing depends on any more goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

# A Slice that ends beyond goes to the last axis, and which that is cannot be seen.
_MOST_AXES = 8


@dataclass(frozen=True)
class _Size:
    """The size of a tensor along an axis, which is known only when the graph runs."""

    tensor: str
    axis: int


_Sizes = list['int | _Size']


def tidy(model: onnx.ModelProto) -> None:
    """Tidy a graph up, in place. It computes the same."""
    _store_singly(model.graph)
    _fix_reshapes(model.graph, _batched(model))
    remove_unused(model.graph)


def _store_singly(graph: onnx.GraphProto) -> None:
    """Give every constant, and every zero point of a DequantizeLinear, a stored tensor of its own."""
    stored = {item.name: item for item in graph.initializer}
    for node in list(graph.node):
        if node.op_type == 'Constant':
            value = helper.get_node_attr_value(node, 'value')
            stored[node.output[0]] = _copy(graph, value, node.output[0])
            graph.node.remove(node)
        elif node.op_type == 'Identity' and node.input[0] in stored:
            stored[node.output[0]] = _copy(graph, stored[node.input[0]], node.output[0])
            graph.node.remove(node)
        elif node.op_type == 'DequantizeLinear' and node.input[2] in stored:
            node.input[2] = _copy(graph, stored[node.input[2]], f'{node.name}/zero_point').name


def _copy(graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = graph.initializer.add()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _batched(model: onnx.ModelProto) -> set[str]:
    """Tensors whose first size is known to be the batch's."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    (given,) = inferred.input
    batch = given.type.tensor_type.shape.dim[0].dim_param
    first = {value.name: value.type.tensor_type.shape.dim[:1] for value in (given, *inferred.value_info)}
    return {name for name, dims in first.items() if dims and dims[0].dim_param == batch}


def _fix_reshapes(graph: onnx.GraphProto, batched: set[str]) -> None:
    """Give every Reshape whose target depends on sizes alone a constant one, where a constant can say it.

    Args:
        graph: Changed in place.
        batched: What :func:`_batched` found.
    """
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != 'Reshape' or node.input[1] in constants:
            continue
        target = _constant_target(_sizes(node.input[1], nodes, constants), node.input[0], batched)
        if target is not None:
            name = f'{node.name}/shape'
            graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
            node.input[1] = name


def _constant_target(sizes: _Sizes | None, data: str, batched: set[str]) -> list[int] | None:
    """A Reshape's target as numbers, or None.

    Args:
        sizes: The target.
        data: Name of the tensor that is reshaped.
        batched: Tensors that begin with the batch.
    """
    if sizes is None:
        return None
    unknown = {i: size for i, size in enumerate(sizes) if isinstance(size, _Size)}
    if len(unknown) == 1 and -1 not in sizes:
        return [-1 if isinstance(size, _Size) else size for size in sizes]
    for i, size in unknown.items():
        both_batches = i == size.axis == 0 and {size.tensor, data} <= batched
        if size != _Size(data, i) and not both_batches:
            return None
    return [0 if isinstance(size, _Size) else size for size in sizes]


def _sizes(name: str, nodes: dict[str, Any], constants: dict[str, NDArray[Any]]) -> _Sizes | None:
    """The elements of a vector (or of a scalar) of sizes, or None if it is more than sizes put together."""
    if name in constants:
        return [int(value) for value in constants[name].reshape(-1)]
    node = nodes.get(name)
    if node is None:
        return None
    parts = [constants.get(other) for other in node.input[1:]]
    if node.op_type in ('Unsqueeze', 'Squeeze', 'Cast'):
        return _sizes(node.input[0], nodes, constants)
    if node.op_type == 'Concat':
        joined: _Sizes = []
        for other in node.input:
            sizes = _sizes(other, nodes, constants)
            if sizes is None:
                return None
            joined += sizes
        return joined
    shape = nodes.get(node.input[0])
    if shape is None or shape.op_type != 'Shape' or shape.attribute or any(part is None for part in parts):
        return None
    axes = _axes(node.op_type, [part.reshape(-1).tolist() for part in parts if part is not None])
    return [_Size(shape.input[0], axis) for axis in axes] if min(axes, default=-1) >= 0 else None


def _axes(kind: str, arguments: list[list[int]]) -> list[int]:
    """Which elements of a Shape a node takes; [] if that is not known. (How many there are is not.)"""
    if kind == 'Gather':
        return arguments[0]
    if kind == 'Slice' and arguments[3:] in ([], [[1]]) and 0 <= arguments[0][0] < arguments[1][0] < _MOST_AXES:
        return list(range(arguments[0][0], arguments[1][0]))
    return []


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and tensors that no output depends on, in place."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    stored = [item for item in graph.initializer if item.name in needed]
    known = [value for value in graph.value_info if value.name in needed]
    for field, items in ((graph.node, kept[::-1]), (graph.initializer, stored), (graph.value_info, known)):
        del field[:]
        field.extend(items)


def set_outputs(model: onnx.ModelProto, shapes: dict[str, list[int]]) -> None:
    """Write the outputs' shapes, which the exporter loses behind operators that it does not know.

    Args:
        model: The graph, changed in place.
        shapes: By name; the first size is the batch's, which stays free.
    """
    for value in model.graph.output:
        element = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, element, ['batch', *shapes[value.name][1:]]))
