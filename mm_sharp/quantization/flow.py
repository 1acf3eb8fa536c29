"""Which layer of a model takes in what: read off autograd's graph of one forward pass (ours).

A float model is run once, on noise. Its graph tells exactly which layers the forward uses, which of them see the
image and which end the network, whose input cannot be negative (it comes out of a ReLU, say), and which BatchNorm
follows a layer directly. Tracing modules symbolically would say the same, but fails on some models and needs the
model in another form; guessing by names or by order of definition is wrong for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)

# Functions by the names that autograd gives their nodes. Whatever comes out of these is not negative ...
_NONNEGATIVE = {
    *('ReluBackward0', 'SigmoidBackward0', 'HardsigmoidBackward0', 'SoftmaxBackward0', 'ExpBackward0'),
    *('AbsBackward0', 'SoftplusBackward0'),
}
# ... and these keep what is not negative so, if all their inputs are. (Padding with a negative number is the exception,
# and the one that shows in every value: see `record`.)
_KEEPING_SIGN = {
    *('MaxPool2DWithIndicesBackward0', 'AvgPool2DBackward0', 'AdaptiveAvgPool2DBackward0', 'MeanBackward0'),
    *('MeanBackward1', 'SumBackward0', 'SumBackward1', 'ViewBackward0', 'UnsafeViewBackward0', 'ReshapeAliasBackward0'),
    *('TransposeBackward0', 'TBackward0', 'PermuteBackward0', 'CatBackward0', 'StackBackward0', 'MulBackward0'),
    *('UpsampleNearest2DBackward0', 'UpsampleBilinear2DBackward0', 'SliceBackward0', 'SelectBackward0'),
    *('SplitBackward0', 'SplitWithSizesBackward0', 'UnbindBackward0', 'SqueezeBackward0', 'SqueezeBackward1'),
    *('UnsqueezeBackward0', 'ExpandBackward0', 'CloneBackward0', 'ToCopyBackward0', 'AliasBackward0'),
    *('ConstantPadNdBackward0', 'IndexBackward0', 'IndexSelectBackward0'),
}


class _Call(NamedTuple):
    """One call of a layer or a BatchNorm.

    Args:
        name: Its dotted name.
        module: What was called.
        taken: Autograd's node of its input; None if nothing is differentiated there.
        made: The node of its output.
        nonnegative: Whether its input had no negative value.
    """

    name: str
    module: nn.Module
    taken: Any
    made: Any
    nonnegative: bool


@dataclass(frozen=True)
class LayerFlow:
    """What one forward pass showed of a layer.

    Args:
        first: The image is in its input without another layer in between.
        last: Its output reaches the model's output without another layer in between.
        nonnegative: Its input cannot be negative.
        calls: How often it was called.
        batchnorm: Name of the BatchNorm that takes its output, and is all that takes it; '' if none.
    """

    first: bool
    last: bool
    nonnegative: bool
    calls: int
    batchnorm: str


def trace_flow(model: nn.Module, inputs: Tensor) -> dict[str, LayerFlow]:
    """Run a float model once and read its layers' places off the graph.

    Args:
        model: A model of MMEngine's kind (``mode='tensor'``); it is left as it was.
        inputs: (N, C, H, W) float, as they leave the data preprocessor.

    Returns:
        By name, every convolution, deconvolution and fully connected layer that was called as a module.
    """
    calls: list[_Call] = []
    # A copy: models may write into their input, which autograd does not let them do to a leaf of its graph.
    image = inputs.detach().requires_grad_(True).clone()
    seen = image.grad_fn

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return None
            # A copy again: its node marks the layer's end even where the output is a view, whose node autograd
            # replaces when a ReLU works in place on it.
            output = output.clone()
            calls.append(_Call(name, module, args[0].grad_fn, output.grad_fn, bool((args[0] >= 0).all())))
            return output

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, (*LAYERS, _BatchNorm))
    ]
    try:
        with evaluation(model), torch.enable_grad():
            outputs = model(image, None, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return _Graph(calls, seen, [tensor.grad_fn for tensor in tensors_of(outputs)]).flows()


class _Graph:
    """Autograd's graph behind the calls of a forward pass."""

    def __init__(self, calls: list[_Call], image: Any, outputs: list[Any]) -> None:
        self._layers = [call for call in calls if isinstance(call.module, LAYERS)]
        self._norms = [call for call in calls if isinstance(call.module, _BatchNorm)]
        self._made_by = {call.made: call.name for call in self._layers if call.made is not None}
        self._image = image
        self._outputs = [node for node in outputs if node is not None]
        self._signs: dict[Any, bool] = {}

    def flows(self) -> dict[str, LayerFlow]:
        last = self._layers_behind(self._outputs)
        count = Counter(call.name for call in self._layers)
        batchnorms = self._batchnorms(count)
        flows: dict[str, LayerFlow] = {}
        for name, _, taken, _, observed in self._layers:
            first = self._image in self._walk([taken])
            nonnegative = observed and self._nonnegative(taken)
            before = flows.get(name)
            flows[name] = LayerFlow(
                first=first or (before is not None and before.first),
                last=name in last,
                nonnegative=nonnegative and (before is None or before.nonnegative),
                calls=count[name],
                batchnorm=batchnorms.get(name, ''),
            )
        return flows

    def _layers_behind(self, nodes: Iterable[Any]) -> set[str]:
        """Layers whose output is in these nodes' values with no other layer in between."""
        found: set[str] = set()
        for node in self._walk(nodes):
            if node in self._made_by:
                found.add(self._made_by[node])
        return found

    def _walk(self, nodes: Iterable[Any]) -> Iterator[Any]:
        """Nodes behind these, up to and including layers' outputs."""
        waiting, seen = [node for node in nodes if node is not None], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            if node not in self._made_by:
                waiting += [before for before, _ in node.next_functions if before is not None]

    def _nonnegative(self, node: Any) -> bool:
        """Whether a node's value cannot be negative."""
        if node is None:
            return False
        if node not in self._signs:
            name = node.name()
            if node in self._made_by:
                sign = False
            elif name in _NONNEGATIVE or _bounded_below(node, name):
                sign = True
            else:
                sums = name == 'AddBackward0' and node._saved_alpha >= 0
                sign = (sums or name in _KEEPING_SIGN) and all(self._nonnegative(n) for n, _ in node.next_functions)
            self._signs[node] = sign
        return self._signs[node]

    def _batchnorms(self, count: Counter[str]) -> dict[str, str]:
        """By layer: the BatchNorm that is the one user of its output."""
        uses = Counter(self._edges()) + Counter(self._outputs)
        once = Counter(call.name for call in self._norms)
        return {
            self._made_by[taken]: name
            for name, _, taken, *_ in self._norms
            if taken in self._made_by and uses[taken] == 1 and once[name] == 1 and count[self._made_by[taken]] == 1
        }

    def _edges(self) -> Iterator[Any]:
        """Every node once for each node that uses its value, in the graph of the outputs."""
        waiting, seen = list(self._outputs), set(self._outputs)
        while waiting:
            for before, _ in waiting.pop().next_functions:
                if before is None:
                    continue
                yield before
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)


def _bounded_below(node: Any, name: str) -> bool:
    """Clamping from 0 or above (ReLU6 is one), and even powers."""
    if name == 'HardtanhBackward0':
        return bool(node._saved_min_val >= 0)
    if name == 'ClampBackward1':
        return node._saved_min is not None and bool(node._saved_min >= 0)
    if name == 'ClampMinBackward0':
        return bool(node._saved_min >= 0)
    return name == 'PowBackward0' and bool(node._saved_exponent % 2 == 0)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without activation checkpointing, which hides the graph."""
    training = {module: module.training for module in model.modules()}
    checkpointed = [module for module in model.modules() if getattr(module, 'with_cp', False)]
    model.eval()
    for module in checkpointed:
        module.with_cp = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.with_cp = True  # type: ignore[assignment]
        for module, mode in training.items():
            module.training = mode
