"""Learned rounding of weights: AdaRound (Nagel et al. 2020, arXiv 2004.10568), layer by layer, without labels.

The nearest integer is the best for each weight, but not for a layer's output. With the scale s fixed, a weight becomes
s * clip(floor(w / s) + h(v)), h(v) = clip(1.2 * sigmoid(v) - 0.1, 0, 1), and v is trained so that the layer's output on
the quantized inputs is the float layer's on the float inputs, with a penalty 1 - |2 h - 1|^beta (equations 21 to 25)
that drives h to 0 or 1. In the end the weights are replaced by what they were rounded to, so that checkpoints are those
of any quantized model.

Ours: both parts are relative, the error to that of the nearest integers and the penalty to a weight, so that one
weighting fits all layers; activations behind a layer are left out; and a layer whose error does not fall keeps the
nearest integers. Brevitas has the rounding function, but its trainer is an example that is not part of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from brevitas.function.ops import max_int, min_int
from mmengine.dist import is_main_process
from mmengine.utils import track_iter_progress
from torch import Tensor, nn

from mm_sharp.errors import UserError

from .flow import forward_hooks, run_batch, without_quantizers
from .record import quantized_record

_LEARNING_RATE = 1e-2
_WARM_UP = 0.2  # share of the steps without penalty
_BETA = (20.0, 2.0)  # the penalty's exponent, from the warm-up's end to the last step
_MOST_VALUES = 2**26  # of a layer's inputs and outputs that are kept, 256 MB each

Pair = tuple[Tensor, Tensor]  # a batch of the layer's quantized input, and the float layer's output


@torch.no_grad()
def learn_rounding(model: nn.Module, batches: Sequence[Any], steps: int) -> dict[str, float]:
    """Round the weights of a calibrated model, in evaluation mode, so that its layers' outputs change least, in place.

    Each of the ``steps`` of Adam for a layer is on one batch, of as many as fit into 256 MB. Returns, by layer, the
    mean square error of its output, as a share of that of the nearest integers.

    Raises UserError: Scales follow the weights: they would change with the rounding.
    """
    check_scales_stay(model)
    found: dict[str, float] = {}
    source = deepcopy(model)  # keeps the float weights
    without_quantizers(source).__enter__()
    wanted = {layer.name for layer in quantized_record(model).quantized}
    called: dict[str, None] = {}  # in order
    with forward_hooks(model, lambda name, _: name in wanted, lambda name, *_: called.setdefault(name)):
        run_batch(model, batches[0])
    for name in track_iter_progress(list(called)) if is_main_process() else called:
        found[name] = _round_layer(model.get_submodule(name), _pairs(name, model, source, batches), steps)
    return found


def check_scales_stay(model: nn.Module) -> None:
    """Refuse, with a UserError, a model whose weights' rounding cannot be learned."""
    if any(layer.policy and layer.policy.weight_scales == 'statistics' for layer in quantized_record(model).quantized):
        raise UserError(
            "learned rounding needs scales that stay: write policy=dict(weight_scales='learned', …), or leave it out"
        )


class _SeenError(Exception):
    """Ends a forward pass once the layer's input is there."""


def _inputs(model: nn.Module, layer: nn.Module, batch: Any) -> Tensor:
    """A layer's input for a batch: that of its first call, if it is called several times."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0].detach().clone())
        raise _SeenError

    with suppress(_SeenError), layer.register_forward_pre_hook(keep):
        run_batch(model, batch)
    return kept[0]


def _pairs(name: str, model: nn.Module, source: nn.Module, batches: Sequence[Any]) -> list[Pair]:
    """A layer's pairs: of its own model, in which the layers before it are rounded, and of the float model."""
    layers: list[Any] = [whole.get_submodule(name) for whole in (model, source)]
    layer, original = layers
    pairs: list[Pair] = []
    values = 0
    for batch in batches:
        taken = layer.input_quant(_inputs(model, layer, batch))
        inputs = getattr(taken, 'value', taken)  # as it is, where what comes before quantizes it (targets)
        expected = original.inner_forward_impl(_inputs(source, original, batch), original.weight, original.bias)
        pairs.append((inputs, expected))
        values += max(inputs.numel(), expected.numel())
        if values > _MOST_VALUES:
            break
    return pairs


def _round_layer(layer: Any, pairs: Sequence[Pair], steps: int) -> float:
    """Learn the rounding of one layer; returns the share of the error that is left."""
    quantized = layer.quant_weight()
    scale, zero_point, bits = quantized.scale, quantized.zero_point, quantized.bit_width
    narrow = layer.weight_quant.is_narrow_range
    low, high = (float(limit(quantized.signed, narrow, bits)) for limit in (min_int, max_int))
    grid = layer.weight / scale + zero_point
    below, nearest = grid.floor(), quantized.value

    def weight(up: Tensor) -> Tensor:
        rounded: Tensor = ((below + up).clamp(low, high) - zero_point) * scale
        return rounded

    start = _error(layer, nearest, pairs)
    if start == 0:
        return 1.0
    share = ((grid - below) + 0.1) / 1.2
    variable = torch.log(share / (1 - share)).requires_grad_(True)
    optimizer = torch.optim.Adam([variable], lr=_LEARNING_RATE)
    for step in range(steps):
        with torch.enable_grad():
            up = _rectified(variable)
            inputs, expected = pairs[step % len(pairs)]
            made = layer.inner_forward_impl(inputs, weight(up), layer.bias)
            loss = (made - expected).square().mean() / start + _penalty(up, step / steps)
            (variable.grad,) = torch.autograd.grad(loss, variable)
        optimizer.step()
    learned = weight((_rectified(variable) > 0.5).to(below))
    left = _error(layer, learned, pairs) / start
    # The nearest integers' values, too: whether a layer was rounded or not, its weights lie on the grid.
    layer.weight.copy_(learned if left < 1 else nearest)
    return min(left, 1.0)


def _rectified(variable: Tensor) -> Tensor:
    return (1.2 * variable.sigmoid() - 0.1).clamp(0, 1)


def _penalty(up: Tensor, progress: float) -> Tensor:
    """The mean of 1 - |2 h - 1|^beta, with beta on its way; 0 in the warm-up."""
    if progress < _WARM_UP:
        return up.new_zeros(())
    first, last = _BETA
    beta = first + (last - first) * (progress - _WARM_UP) / (1 - _WARM_UP)
    return (1 - (2 * up - 1).abs().pow(beta)).mean()


def _error(layer: Any, weight: Tensor, pairs: Sequence[Pair]) -> float:
    errors = [(layer.inner_forward_impl(x, weight, layer.bias) - y).square().mean() for x, y in pairs]
    return float(torch.stack(errors).mean())
