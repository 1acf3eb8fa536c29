"""Activations that are quantized between layers: which of them a target needs, and the modules that do it.

Residual sums, ``torch.cat`` and the like are no modules, but their results are outputs or inputs of modules, of a block
for instance. Autograd's graph tells which, and a hook on that module quantizes there, in training as in the exported
file. A result that no module puts out or takes in (a sum in the middle of other sums) stays float.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from brevitas.nn import QuantIdentity
from torch import nn

from .flow import Graph, nodes_before, nodes_behind
from .policy import LayerPolicy, Target
from .quantizers import input_quantizer, repair

POINT = 'quantized_{}'  # name of the module in its host: of 'input' or 'output'
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
# No hosts: their forward may run over all their children.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# By the names that autograd gives its nodes. A ReLU is part of the quantizer behind it, which is unsigned.
_RELUS = re.compile('(Relu|Hardtanh)Backward0|Clamp(Min)?Backward[01]')
_COMPUTED = re.compile(
    '(Add|Mul|Cat|Silu|Hardswish|Hardsigmoid|Sigmoid|LeakyRelu|Gelu|Mish|Elu|PreluKernel|AvgPool2D|AdaptiveAvgPool2D|'
    'UpsampleBilinear2D)Backward0|MeanBackward1'
)
# Their values are those of their input, so that they are quantized if it is.
_KEEPING_VALUES = re.compile(
    '(MaxPool2DWithIndices|UpsampleNearest2D|View|UnsafeView|ReshapeAlias|Transpose|T|Permute|Slice|Select|Split|'
    'SplitWithSizes|Unbind|Unsqueeze|Expand|Clone|Alias)Backward0|SqueezeBackward[01]'
)


@dataclass(frozen=True)
class Point:
    """A tensor that is quantized where a module puts it out or takes it in."""

    module: str  # its name
    side: str  # 'output' or 'input'
    nonnegative: bool
    node: Any  # autograd's, in the graph in which it was found

    @property
    def name(self) -> str:
        """Of the module that quantizes it."""
        return f'{self.module}.{POINT.format(self.side)}'


def find_points(graph: Graph, target: Target, layers: Collection[str]) -> list[Point]:
    """The points that a target needs, in the order of the forward pass.

    The graph is the float model's, with BatchNorms folded; ``layers`` are the names of those that are quantized.
    """
    network = _Network(graph, layers)
    nodes = network.computed() if target.outputs else network.skips() if target.skips else set()
    found = {node: place for node in nodes if (place := network.place(node))}
    order = {call.name: number for number, call in enumerate(graph.calls)}
    return sorted(
        (
            Point(*place, nonnegative=not target.signed and graph.nonnegative(node), node=node)
            for node, place in found.items()
        ),
        key=lambda point: order[point.module],
    )


def covered(graph: Graph, points: Sequence[Point]) -> dict[str, Point]:
    """By name, the layers whose input a point has quantized already, in all their calls."""
    outputs = {point.node: point for point in points if point.side == 'output'}
    inputs = {point.node: point for point in points if point.side == 'input'}
    found: dict[str, set[Point | None]] = defaultdict(set)
    for call in graph.layer_calls:
        node, point = call.taken, None
        while node is not None and point is None:
            point = outputs.get(node)
            inside = inputs.get(node)
            if inside is not None and f'{call.name}.'.startswith(f'{inside.module}.'):
                point = inside
            node = nodes_before(node)[0] if _KEEPING_VALUES.fullmatch(node.name()) else None
        found[call.name].add(point)
    return {name: only for name, (only, *others) in found.items() if only is not None and not others}


def insert_points(model: nn.Module, points: Sequence[Point], policy: LayerPolicy) -> None:
    """Have the modules quantize their output or input by a module of their own, ``quantized_output``, in place.

    Its scale is trained if anything of its host is, as the scale of a layer's input is if the layer is trained.
    """
    for point in points:
        host = model.get_submodule(point.module)
        quantizer = QuantIdentity(act_quant=input_quantizer(policy, nonnegative=point.nonnegative))
        repair(quantizer)
        trained = [parameter.requires_grad for parameter in host.parameters()]
        quantizer.requires_grad_(policy.act_scales == 'learned' and any(trained or [True]))
        host.add_module(POINT.format(point.side), quantizer.train(host.training))
        if point.side == 'output':
            host.register_forward_hook(_quantize_output)
        else:
            host.register_forward_pre_hook(_quantize_input)


# Functions of their own, so that copies of a model have hooks that use the copy's quantizers.
def _quantize_output(host: Any, args: Any, output: Any) -> Any:
    return host.quantized_output(output).to(output.dtype)


def _quantize_input(host: Any, args: Any) -> Any:
    return host.quantized_input(args[0]).to(args[0].dtype), *args[1:]


class _Network:
    def __init__(self, graph: Graph, layers: Collection[str]) -> None:
        self._graph = graph
        self._users, self._seen = graph.users, graph.sees_image()
        convolutions = [c for c in graph.layer_calls if c.name in layers and isinstance(c.module, _CONVOLUTIONS)]
        self._ahead = nodes_behind([call.taken for call in convolutions], ())  # of which a convolution takes something
        last = {name for name, flow in graph.flows().items() if flow.last}
        self._convolved = {call.made for call in convolutions if call.name not in last}
        self._calls = Counter(call.name for call in graph.calls)

    def computed(self) -> set[Any]:
        """What convolutions put out, and what is computed on the way to others."""
        found = set()
        for node in self._seen:
            relu = _RELUS.fullmatch(node.name()) is not None
            on_the_way = node in self._ahead and (relu or self._computes(node))
            if on_the_way or node in self._convolved or (relu and self._convolved & set(nodes_before(node))):
                found.add(node)
        return {node for node in found if not self._before_relu(node)}

    def skips(self) -> set[Any]:
        """Of each residual sum, the input that comes by the way around."""
        found = set()
        for node in self._seen:
            parts = nodes_before(node)
            if node.name() == 'AddBackward0' and len(parts) == 2 and self._seen.issuperset(parts):
                # Both may be a layer's output: then the first, since the second joins it where it is computed.
                others = [part for part in parts if part not in self._graph.made_by] or parts[1:]
                found.add(max(others, key=lambda part: len(self._users[part])))
        return found

    def place(self, node: Any) -> tuple[str, str] | None:
        """The module, and the side of it, where a tensor can be quantized: the innermost that puts it out, or else the
        outermost that takes it in, and that is called once."""
        calls = [c for c in self._graph.calls if self._calls[c.name] == 1 and not isinstance(c.module, _CONTAINERS)]
        # A module may pass its input on (Identity, Dropout). Whether others read what it takes in or what it puts out,
        # which is the same tensor, nothing tells: if there are others, it is no place for the output.
        alone = all(call.made is node for call in self._graph.calls if call.taken is node)
        for call in calls:
            if call.made is node and (alone or call.taken is not node):
                return call.name, 'output'
        takers = [call for call in calls if call.taken is node]
        if takers and len(self._users[node]) > 1:  # a single user has a quantizer, if it is a layer
            return takers[-1].name, 'input'
        return None

    def _computes(self, node: Any) -> bool:
        """Whether a node makes new values of pictures: not by adding or multiplying a constant."""
        pictures = [before for before in nodes_before(node) if before in self._seen]
        two = node.name() in ('AddBackward0', 'MulBackward0')
        return _COMPUTED.fullmatch(node.name()) is not None and (len(pictures) == 2 or not two)

    def _before_relu(self, node: Any) -> bool:
        users = self._users[node]
        return len(users) == 1 and _RELUS.fullmatch(users[0].name()) is not None
