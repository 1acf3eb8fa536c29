"""Which layer of a model takes in what: read off autograd's graph of one forward pass.

A float model is run once, on noise. Its graph tells which layers the forward uses, which of them see the image and
which end the network, whose input cannot be negative (it comes out of a ReLU, say), and which BatchNorm follows a layer
directly. Symbolic tracing would say the same, but fails on some models; guessing by names is wrong for others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from brevitas.graph.calibrate import quantization_status_manager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)

# Functions by the names that autograd gives their nodes. Whatever comes out of these is not negative ...
_NONNEGATIVE = re.compile('(Relu|Sigmoid|Hardsigmoid|Softmax|Exp|Abs|Softplus)Backward0')
# ... and these keep what is not negative so, if all their inputs are. (Padding with a negative number is the exception,
# and the one that shows in every value: see `record`.)
_KEEPING_SIGN = re.compile(
    '(MaxPool2DWithIndices|AvgPool2D|AdaptiveAvgPool2D|UpsampleNearest2D|UpsampleBilinear2D|Mul|Cat|Stack|View|'
    'UnsafeView|ReshapeAlias|Transpose|T|Permute|Slice|Select|Split|SplitWithSizes|Unbind|Unsqueeze|Expand|Clone|'
    'ToCopy|Alias|ConstantPadNd|Index|IndexSelect)Backward0|(Mean|Sum|Squeeze)Backward[01]'
)
# Clamping (ReLU6 is one), and where its node keeps the lower limit.
_CLAMPING = dict(HardtanhBackward0='_saved_min_val', ClampBackward1='_saved_min', ClampMinBackward0='_saved_min')


class _Call(NamedTuple):
    """One call of a layer or a BatchNorm."""

    name: str
    module: nn.Module
    taken: Any  # autograd's node of its input; None if nothing is differentiated there
    made: Any  # the node of its output
    nonnegative: bool  # whether its input had no negative value


@dataclass(frozen=True)
class LayerFlow:
    """What one forward pass showed of a layer."""

    first: bool  # the image is in its input without another layer in between
    last: bool  # its output reaches the model's output without another layer in between
    nonnegative: bool  # its input cannot be negative
    batchnorm: str  # name of the BatchNorm that takes its output, and is all that takes it; '' if none


def trace_flow(model: nn.Module, inputs: Tensor) -> dict[str, LayerFlow]:
    """Run a float model once, on (N, C, H, W) inputs; returns, by name, every layer that was called as a module."""
    calls: list[_Call] = []
    # A copy: models may write into their input, which autograd does not let them do to a leaf of its graph.
    image = inputs.detach().requires_grad_(True).clone()
    start = image.grad_fn

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

    hooks = forward_hooks(model, record, lambda _, module: isinstance(module, (*LAYERS, _BatchNorm)))
    with evaluation(model), hooks, torch.enable_grad():
        outputs = model(image, None, mode='tensor')
    return _Graph(calls, start, [tensor.grad_fn for tensor in tensors_of(outputs)]).flows()


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
        last = {self._made_by.get(node) for node in _behind(self._outputs, self._made_by)}
        batchnorms = self._batchnorms()
        flows: dict[str, LayerFlow] = {}
        for call in self._layers:
            before = flows.get(call.name, LayerFlow(False, False, True, ''))  # of an earlier call
            flows[call.name] = LayerFlow(
                first=before.first or self._image in _behind([call.taken], self._made_by),
                last=call.name in last,
                nonnegative=before.nonnegative and call.nonnegative and self._nonnegative(call.taken),
                batchnorm=batchnorms.get(call.name, ''),
            )
        return flows

    def _nonnegative(self, node: Any) -> bool:
        """Whether a node's value cannot be negative."""
        if node is None or node in self._made_by:
            return False
        if node not in self._signs:
            name = node.name()
            keeps = _KEEPING_SIGN.fullmatch(name) or (name == 'AddBackward0' and node._saved_alpha >= 0)
            low = getattr(node, _CLAMPING[name]) if name in _CLAMPING else None
            self._signs[node] = (
                _NONNEGATIVE.fullmatch(name) is not None
                or (low is not None and low >= 0)
                or (name == 'PowBackward0' and node._saved_exponent % 2 == 0)
                or (bool(keeps) and all(self._nonnegative(before) for before, _ in node.next_functions))
            )
        return self._signs[node]

    def _batchnorms(self) -> dict[str, str]:
        """By layer: the BatchNorm that is the one user of its output."""
        uses = Counter(self._outputs)  # how many nodes use a node's value
        for node in _behind(self._outputs, ()):
            uses.update(_before(node))
        calls = Counter(call.name for call in (*self._layers, *self._norms))
        pairs = {self._made_by[norm.taken]: norm for norm in self._norms if norm.taken in self._made_by}
        return {
            layer: norm.name
            for layer, norm in pairs.items()
            if uses[norm.taken] == calls[norm.name] == calls[layer] == 1
        }


def _before(node: Any) -> list[Any]:
    return [before for before, _ in node.next_functions if before is not None]


def _behind(nodes: Iterable[Any], ends: Container[Any]) -> set[Any]:
    """These nodes and those behind them, up to and including ends."""
    remaining, seen = [node for node in nodes if node is not None], set()
    while remaining:
        node = remaining.pop()
        if node not in seen:
            seen.add(node)
            remaining += [] if node in ends else _before(node)
    return seen


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a model's output, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """What inference runs, up to the head's raw output, which is returned."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    data = batch if preprocessor is None else preprocessor(batch, False)
    inputs = data['inputs'] if isinstance(data, dict) else data[0]
    return model(inputs, None, mode='tensor')


def float_output(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model puts out in evaluation mode without its quantizers. No global random number is drawn."""
    with torch.random.fork_rng(devices=[]), evaluation(model), without_quantizers(model), torch.no_grad():
        torch.default_generator.manual_seed(0)
        return flat(model(inputs.clone(), None, mode='tensor'))


def flat(outputs: Any) -> Tensor:
    """All values of a model's outputs as one vector."""
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(outputs)])


def without_quantizers(model: nn.Module) -> quantization_status_manager:
    """A context in which a model in evaluation mode runs in float; nothing of its quantizers' state changes."""
    return quantization_status_manager(model, disable_act_quant=True, disable_weight_quant=True, is_training=False)


@contextmanager
def forward_hooks(
    model: nn.Module, hook_of: Callable[[str], Any], wanted: Callable[[str, nn.Module], bool]
) -> Iterator[None]:
    """Forward hooks, made by name, on the modules of a model that are wanted, while the context lasts."""
    modules = dict(model.named_modules()).items()
    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules if wanted(name, module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without activation checkpointing, which hides the graph."""
    before = {module: (module.training, vars(module).get('with_cp')) for module in model.modules()}
    model.eval()
    for module, (_, checkpointed) in before.items():
        if checkpointed:
            module.with_cp = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, (training, checkpointed) in before.items():
            module.training = training
            if checkpointed:
                module.with_cp = checkpointed
