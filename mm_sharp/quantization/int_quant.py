"""Brevitas's fake quantization without zero point, ``clamp(round(x / scale)) * scale``, in fewer operations.

Brevitas runs nine operations on whole tensors, each with memory of its own, and as many in the backward pass. A learned
scale, ``max(|value|, minimum) / integers``, it computes by a dozen modules, in each pass, whatever the batch. Here the
same arithmetic in the same order is one autograd function each: outputs and gradients are Brevitas's bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity, ScalarSignedClampMinSte, TensorClampSte
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling
from torch import Tensor, nn
from torch._dynamo import is_compiling  # torch.compiler has it from torch 2.3 on

from mm_sharp.ops.quantized_perturbation import KeptIntegers

# Of these an integer and a half is a number.
_EXACT = (torch.float32, torch.float64)


@dataclass
class FrozenWeights:
    """The weights of a layer that keep their integers, whatever the scale and the optimizer do.

    An object, not tensors of the module itself, whose attributes are put back before the second forward of a step.
    """

    mask: Tensor  # bool
    integers: Tensor  # float32; of weights that are not frozen, anything

    def applied_to(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The weights with ``scale * integer`` where they are frozen: no gradient reaches those, the scale's does."""
        return torch.where(self.mask, (self.integers * scale).to(weights), weights)


class FusedIntQuant(IntQuant):  # type: ignore[misc]
    """Takes the place of Brevitas's ``IntQuant`` where the zero point is 0.

    Attributes:
        kept: The integers of the first forward of a step, where another forward rounds the same to the same.
        frozen: The weights that are frozen, if any.
        lsq_counts: What :func:`lsq_factor` counts: ``'weights'`` or ``'features'``; '' leaves gradients as they are.
    """

    kept: KeptIntegers | None = None
    frozen: FrozenWeights | None = None
    lsq_counts: str = ''

    def forward(
        self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor, bounds: tuple[float, float] | None = None
    ) -> Tensor:
        """Fake-quantize ``x``, whose shape the scale is broadcast to; ``bounds`` if they are known already."""
        x = self.input_view_impl(x)
        if self.lsq_counts and scale.requires_grad and torch.is_grad_enabled():
            count = x[0].numel() if self.lsq_counts == 'features' else x.numel() // scale.numel()
            factor = lsq_factor(count, self.min_int(bit_width), self.max_int(bit_width))
            scale = _ScaleGradient.apply(scale, factor)  # type: ignore[no-untyped-call]
        if self.frozen is not None:
            x = self.frozen.applied_to(x, scale)
        if x.dtype != scale.dtype or x.dtype not in _EXACT or _is_traced():
            result: Tensor = super().forward(scale, zero_point, bit_width, x)
            return result
        if bounds is None:
            bounds = self.bounds(bit_width)
        kept = self.kept or KeptIntegers()
        rounded = None if kept.recording else kept.values
        if rounded is None:
            with torch.no_grad():
                rounded = torch.div(x, scale).round_()
        if kept.recording:
            kept.values = rounded
        through_clamp = isinstance(self.tensor_clamp_impl, TensorClampSte)
        again = partial(super().forward, zero_point=zero_point, bit_width=bit_width)
        return _FakeQuantize.apply(x, scale, rounded, bounds, through_clamp, again)  # type: ignore[no-any-return, no-untyped-call]

    def bounds(self, bit_width: Tensor) -> tuple[float, float]:
        """The lowest and the highest integer; an accelerator is waited for."""
        return float(self.min_int(bit_width)), float(self.max_int(bit_width))


class FusedRescalingIntQuant(RescalingIntQuant):  # type: ignore[misc]
    """Takes the place of Brevitas's ``RescalingIntQuant``: what follows from a constant bit width is computed once."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fake-quantized ``x``, scale, zero point and bit width."""
        if type(self.msb_clamp_bit_width_impl) is not BitWidthConst or self.observer_only or _is_traced():
            result: tuple[Tensor, Tensor, Tensor, Tensor] = super().forward(x)
            return result
        held: Tensor = self.msb_clamp_bit_width_impl.bit_width.value
        known: _Constants | None = vars(self).get('known')
        version = 0 if held.is_inference() else held._version
        if known is None or known.bit_width is not held or known.version != version:
            known = self.known = _Constants(held, version, self.int_scaling_impl(held), self.int_quant.bounds(held))
        scaling = self.scaling_impl
        minimum = minimum_of(scaling)
        if minimum is not None and is_learned_now(scaling):
            scale = learned_scale(scaling.value, minimum, known.integers)
        else:
            scale = scaling(x, known.integers)
        zero_point = self.zero_point_impl(x, scale, held)
        return self.int_quant(scale, zero_point, held, x, known.bounds), scale, zero_point, held


class _Constants(NamedTuple):
    """What follows from a bit width."""

    bit_width: Tensor  # scalar; as it was at its `version`
    version: int
    integers: Tensor  # what the scale's range is divided by, scalar
    bounds: tuple[float, float]  # the lowest and the highest integer


def _is_traced() -> bool:
    """Whether a compiler or an exporter watches: it is shown Brevitas's own operations."""
    return is_compiling() or torch._C._get_tracing_state() is not None


def lsq_factor(count: int, low: Tensor, high: Tensor) -> Tensor:
    """What a scale's gradient is multiplied by so that SGD moves the scale as in LSQ.

    LSQ (Esser et al. 2020, arXiv 1902.08153, section 2.2) multiplies the gradient of the step size s by
    g = 1 / sqrt(N * Qp): N weights or, of one sample, features; Qp the highest integer. Brevitas trains not s but the
    range t = k * s, with k = max(-lowest, highest) integers: SGD on t moves s by 1 / k**2 of its gradient, on top. So
    the factor is k**2 * g. ``count`` is N: features of one sample, or, with a scale for each channel (ours), the
    weights of a channel; ``low`` and ``high`` are the lowest and the highest integer.
    """
    return torch.maximum(-low, high) ** 2 / torch.sqrt(count * high)


def minimum_of(scaling: Any) -> float | None:
    """What the range of a learned scale is at least; None of a scale that is made in another way than above."""
    if type(scaling) is ParameterFromStatsFromParameterScaling:
        first = scaling.stats_scaling_impl.restrict_clamp_scaling
        last = scaling.stats_scaling_impl.restrict_clamp_scale_threshold
        restrict, clamp, others = first.restrict_value_impl, first.clamp_ste, [last.restrict_value_impl, last.clamp_ste]
    elif type(scaling) is ParameterFromRuntimeStatsScaling:
        restrict, clamp = scaling.restrict_scaling.restrict_value_impl, scaling.clamp_scaling.clamp_min_ste
        others = [scaling.restrict_scale_threshold.restrict_value_impl]
    else:
        return None
    if type(restrict) is not FloatRestrictValue or any(type(other) is not Identity for other in others):
        return None
    if isinstance(clamp, ScalarSignedClampMinSte):
        return float(clamp.min_val)
    return 0.0 if type(clamp) is Identity else None


def is_learned_now(scaling: Any) -> bool:
    """Whether this forward takes the scale from its parameter, and computes it as in training."""
    if type(scaling) is ParameterFromStatsFromParameterScaling:
        return bool(scaling.init_done)
    return bool(scaling.training and scaling.counter > scaling.collect_stats_steps)


def learned_scale(value: nn.Parameter, minimum: float, integers: Tensor) -> Tensor:
    """The scale, of the shape of ``value``; ``integers`` is what its range is divided by, scalar."""
    scale: Tensor = _LearnedScale.apply(value, minimum, integers)  # type: ignore[no-untyped-call]
    return scale


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class _LearnedScale(torch.autograd.Function):
    """The gradient goes straight through the minimum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, minimum: float, integers: Tensor) -> Tensor:
        ctx.save_for_backward(value, integers)
        return value.abs().clamp_min_(minimum).div_(integers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        value, integers = ctx.saved_tensors
        return gradient / integers * value.sgn(), None, None


class _FakeQuantize(torch.autograd.Function):
    """Gradients go straight through the rounding; through the clamp if told to, or else where it changed nothing.

    Second derivatives (of sharpness, by the Hessian) are those of Brevitas's own operations, ``again``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        rounded: Tensor,
        bounds: tuple[float, float],
        through_clamp: bool,
        again: Any,
    ) -> Tensor:
        ctx.bounds, ctx.through_clamp, ctx.again = bounds, through_clamp, again
        ctx.save_for_backward(x, scale, rounded)
        return rounded.clamp(*bounds).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, rounded = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [tensor for tensor, needed in zip((x, scale), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(ctx.again(x=x, scale=scale), inputs, gradient, create_graph=True))
            both = [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]
            return *both, None, None, None, None
        of_input, of_scale = gradient * scale, None
        if not ctx.through_clamp:
            low, high = ctx.bounds
            # 0 for integers that are not between these, which none is equal to.
            torch.ops.aten.hardtanh_backward(of_input, rounded, low - 0.5, high + 0.5, grad_input=of_input)
        if ctx.needs_input_grad[1]:
            values = rounded.clamp(*ctx.bounds).mul_(gradient)
            through_integers = values.sum_to_size(scale.shape)
            through_ratio = torch.div(x, scale, out=values).div_(scale).mul_(of_input).sum_to_size(scale.shape)
            of_scale = through_integers - through_ratio
        return of_input.div_(scale) if ctx.needs_input_grad[0] else None, of_scale, None, None, None, None
