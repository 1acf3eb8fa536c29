"""A quantizer's learned scale, ``max(|value|, minimum) / integers``, in one autograd function.

Brevitas computes it by a dozen modules, each of a few operations on a number for each channel; a pass does that for
each quantizer, whatever the batch. Scales and gradients here are Brevitas's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.function_wrapper import Identity, ScalarSignedClampMinSte
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling
from torch import Tensor, nn


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
