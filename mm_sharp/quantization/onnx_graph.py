"""Where an exported graph quantizes activations, and copies of it in which these places can be read and set (ours).

A QCDQ graph quantizes by QuantizeLinear, then by Clip if there are fewer than 8 bits: what comes out are integers. A
QONNX graph quantizes by ``Quant``: what comes out are integers times the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

FORCED = '/forced'


@dataclass(frozen=True)
class ActivationPoint:
    """A place where a graph quantizes an activation.

    Args:
        node: Name of the node, which has the layer's name in it.
        tensor: Name of what comes out.
        scale: Size of a quantization step.
        zero_point: The integer that stands for 0.
        integers: Whether integers come out, or integers times the scale.
        dtype: Of what comes out.
    """

    node: str
    tensor: str
    scale: float
    zero_point: float
    integers: bool
    dtype: np.dtype[Any]

    def to_integers(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """What came out as integers, of the same shape."""
        if self.integers:
            return values.astype(np.int32)
        steps: NDArray[Any] = np.round(values / np.float32(self.scale) + np.float32(self.zero_point))
        return steps.astype(np.int32)

    def from_integers(self, integers: NDArray[np.int32]) -> NDArray[Any]:
        """Integers as what comes out, of the same shape."""
        if self.integers:
            return integers.astype(self.dtype)
        values = (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values.astype(self.dtype)


def activation_points(model: onnx.ModelProto) -> list[ActivationPoint]:
    """The places where a graph quantizes activations, in the order of its nodes, which is that of the forward pass."""
    known = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == 'Clip'}
    points = []
    for node in model.graph.node:
        if node.op_type not in ('QuantizeLinear', 'Quant') or node.input[0] in known:
            continue
        integers = node.op_type == 'QuantizeLinear'
        scale, zero_point = (known[name] for name in node.input[1:3])
        made = node.output[0]
        points.append(
            ActivationPoint(
                node=node.name,
                tensor=clipped.get(made, made) if integers else made,
                scale=float(scale),
                zero_point=float(zero_point),
                integers=integers,
                dtype=zero_point.dtype if integers else np.dtype(np.float32),
            )
        )
    return points


def with_outputs(model: onnx.ModelProto, points: Sequence[ActivationPoint]) -> onnx.ModelProto:
    """A copy of a graph whose further outputs are what comes out at the points."""
    copy = deepcopy(model)
    for point in points:
        element = helper.np_dtype_to_tensor_dtype(point.dtype)
        copy.graph.output.append(helper.make_tensor_value_info(point.tensor, element, None))
    return copy


def with_inputs(
    model: onnx.ModelProto, points: Sequence[ActivationPoint], shapes: Mapping[str, Sequence[int]]
) -> onnx.ModelProto:
    """A copy in which every layer takes its quantized input from outside, so that it can be judged by itself.

    What comes out at the points goes nowhere; what goes on from there comes in, as inputs by the tensor's name and
    :data:`FORCED`.

    Args:
        model: The graph.
        points: Its points.
        shapes: By the tensor's name, its shape behind the batch's size.
    """
    copy = deepcopy(model)
    tensors = {point.tensor for point in points}
    for node in copy.graph.node:
        for i, name in enumerate(node.input):
            if name in tensors:
                node.input[i] = name + FORCED
    for point in points:
        element = helper.np_dtype_to_tensor_dtype(point.dtype)
        shape: list[str | int | None] = ['batch', *shapes[point.tensor]]
        copy.graph.input.append(helper.make_tensor_value_info(point.tensor + FORCED, element, shape))
    return copy
