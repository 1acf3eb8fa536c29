"""Which layer of a model takes in what: read off autograd's graph of one forward pass.

A float model is run once, on noise. Its graph tells which layers the forward uses, which of them see the image and
which end the network, whose input cannot be negative (it comes out of a ReLU, say), and which BatchNorm follows a layer
directly. Symbolic tracing would say the same, but fails on some models; guessing by names is wrong for others.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
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


class Call(NamedTuple):
    """One call of a module."""

    name: str
    module: nn.Module
    taken: Any  # autograd's node of its input; None if nothing is differentiated there
    made: Any  # the node of its output; None if that is no tensor
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
    return trace_graph(model, inputs).flows()


def trace_graph(model: nn.Module, inputs: Tensor) -> Graph:
    """Run a float model once, on (N, C, H, W) inputs, and keep autograd's graph of it."""
    calls: list[Call] = []
    taken: dict[str, Any] = {}
    # A copy: models may write into their input, which autograd does not let them do to a leaf of its graph.
    image = inputs.detach().requires_grad_(True).clone()
    start = image.grad_fn

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Before the forward: modules may work on their input in place, which then has another node.
        taken[name] = args[0].grad_fn if args and isinstance(args[0], Tensor) else None

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        layer = isinstance(module, (*LAYERS, _BatchNorm)) and isinstance(output, Tensor)
        # A copy again: its node marks the layer's end even where the output is a view, whose node autograd replaces
        # when a ReLU works in place on it.
        output = output.clone() if layer else output
        made = output.grad_fn if isinstance(output, Tensor) else None
        calls.append(Call(name, module, taken[name], made, layer and bool((args[0] >= 0).all())))
        return output if layer else None

    with evaluation(model), forward_hooks(model, lambda name, _: name != '', after, before), torch.enable_grad():
        outputs = model(image, None, mode='tensor')
    return Graph(calls, start, [tensor.grad_fn for tensor in tensors_of(outputs)])


class Graph:
    """Autograd's graph behind the calls of a forward pass."""

    def __init__(self, calls: Sequence[Call], image: Any, outputs: list[Any]) -> None:
        self.calls = calls  # in the order in which they ended
        self.layer_calls = [call for call in calls if isinstance(call.module, LAYERS)]
        self._norms = [call for call in calls if isinstance(call.module, _BatchNorm)]
        self.made_by = {call.made: call.name for call in self.layer_calls if call.made is not None}
        self._image = image
        self._outputs = [node for node in outputs if node is not None]
        self._signs: dict[Any, bool] = {}

    def flows(self) -> dict[str, LayerFlow]:
        last = {self.made_by.get(node) for node in nodes_behind(self._outputs, self.made_by)}
        batchnorms = self._batchnorms()
        flows: dict[str, LayerFlow] = {}
        for call in self.layer_calls:
            before = flows.get(call.name, LayerFlow(False, False, True, ''))  # of an earlier call
            flows[call.name] = LayerFlow(
                first=before.first or self._image in nodes_behind([call.taken], self.made_by),
                last=call.name in last,
                nonnegative=before.nonnegative and call.nonnegative and self.nonnegative(call.taken),
                batchnorm=batchnorms.get(call.name, ''),
            )
        return flows

    def nonnegative(self, node: Any) -> bool:
        """Whether a node's value cannot be negative."""
        if node is None or node in self.made_by:
            return False
        if node not in self._signs:
            name = node.name()
            keeps = _KEEPING_SIGN.fullmatch(name) or (name == 'AddBackward0' and node._saved_alpha >= 0)
            low = getattr(node, _CLAMPING[name]) if name in _CLAMPING else None
            self._signs[node] = (
                _NONNEGATIVE.fullmatch(name) is not None
                or (low is not None and low >= 0)
                or (name == 'PowBackward0' and node._saved_exponent % 2 == 0)
                or (bool(keeps) and all(self.nonnegative(before) for before, _ in node.next_functions))
            )
        return self._signs[node]

    @cached_property
    def users(self) -> dict[Any, list[Any]]:
        """By node, those that use its value."""
        found: dict[Any, list[Any]] = defaultdict(list)
        for node in nodes_behind(self._outputs, ()):
            for before in nodes_before(node):
                found[before].append(node)
        return found

    def sees_image(self) -> set[Any]:
        """The nodes that the image is behind."""
        return _reached([self._image], self.users.__getitem__)

    def _batchnorms(self) -> dict[str, str]:
        """By layer: the BatchNorm that is the one user of its output."""
        calls = Counter(call.name for call in (*self.layer_calls, *self._norms))
        pairs = {self.made_by[norm.taken]: norm for norm in self._norms if norm.taken in self.made_by}
        return {
            layer: norm.name
            for layer, norm in pairs.items()
            if len(self.users[norm.taken]) == calls[norm.name] == calls[layer] == 1 and norm.taken not in self._outputs
        }


def nodes_before(node: Any) -> list[Any]:
    """What a node computes with."""
    return [before for before, _ in node.next_functions if before is not None]


def nodes_behind(nodes: Iterable[Any], ends: Container[Any]) -> set[Any]:
    """These nodes and those behind them, up to and including ends."""
    given = [node for node in nodes if node is not None]
    return _reached(given, lambda node: [] if node in ends else nodes_before(node))


def _reached(remaining: list[Any], following: Callable[[Any], list[Any]]) -> set[Any]:
    seen = set()
    while remaining:
        node = remaining.pop()
        if node not in seen:
            seen.add(node)
            remaining += following(node)
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


def noise_of(model: nn.Module, width: int, height: int) -> Tensor:
    """(1, C, H, W) for a model, to see what it computes. No global random number is drawn."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, channels_of(model), height, width, generator=generator)
    return noise.to(next(model.parameters()))


def channels_of(model: nn.Module) -> int:
    """How many channels a model's pictures have: as many as its data preprocessor has means, or 3."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    return 3 if mean is None else int(mean.numel())


def float_output(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model puts out in evaluation mode without its quantizers. No global random number is drawn."""
    with torch.random.fork_rng(devices=[]), evaluation(model), without_quantizers(model), torch.no_grad():
        torch.default_generator.manual_seed(0)
        return flat(model(inputs.clone(), None, mode='tensor'))


def flat(outputs: Any) -> Tensor:
    """All values of a model's outputs as one vector."""
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(outputs)])


def is_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs differ by rounding alone, which makes 1e-7 to 1e-5 of the largest value."""
    tolerance = 1e-3 * float(expected.nan_to_num(0, 0, 0).abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, 0, tolerance, equal_nan=True)


def without_quantizers(model: nn.Module) -> quantization_status_manager:
    """A context in which a model in evaluation mode runs in float; nothing of its quantizers' state changes."""
    return quantization_status_manager(model, disable_act_quant=True, disable_weight_quant=True, is_training=False)


@contextmanager
def forward_hooks(
    model: nn.Module,
    wanted: Callable[[str, nn.Module], bool],
    hook: Callable[..., Any],
    pre_hook: Callable[..., None] = lambda name, module, args: None,
) -> Iterator[None]:
    """Forward hooks on the modules that are wanted, which also take the module's name, while the context lasts."""
    with ExitStack() as handles:
        for name, module in model.named_modules():
            if wanted(name, module):
                handles.enter_context(module.register_forward_pre_hook(partial(pre_hook, name)))
                handles.enter_context(module.register_forward_hook(partial(hook, name)))
        yield


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
