"""The quantizers that a policy names, as subclasses of Brevitas's own.

Weights: integers of one scale for each output channel or for the tensor; in Brevitas's terms narrow range where they
are symmetric. Inputs: one scale; unsigned where they cannot be negative. Biases stay in float: they are added to
accumulators, not multiplied.

Learned scales are Brevitas's ``PARAMETER_FROM_STATS``: a parameter that calibration initialises, with
straight-through rounding in between, as in LSQ (Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any

from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import ScalingImplType
from brevitas.quant.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMSE,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFloat,
    Int8WeightPerTensorFloatMSE,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMSE,
)
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloatMSE,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerChannelFloatMSE,
    ShiftedUint8WeightPerTensorFloat,
    ShiftedUint8WeightPerTensorFloatMSE,
)

from .policy import LayerPolicy

# By granularity, symmetry and what scales start from. Bits and how scales go on are set by `let`.
_WEIGHTS: dict[tuple[str, bool, str], type[ExtendedInjector]] = {
    ('channel', True, 'max'): Int8WeightPerChannelFloat,
    ('channel', True, 'mse'): Int8WeightPerChannelFloatMSE,
    ('channel', False, 'max'): ShiftedUint8WeightPerChannelFloat,
    ('channel', False, 'mse'): ShiftedUint8WeightPerChannelFloatMSE,
    ('tensor', True, 'max'): Int8WeightPerTensorFloat,
    ('tensor', True, 'mse'): Int8WeightPerTensorFloatMSE,
    ('tensor', False, 'max'): ShiftedUint8WeightPerTensorFloat,
    ('tensor', False, 'mse'): ShiftedUint8WeightPerTensorFloatMSE,
}
# By sign, symmetry and what scales start from.
_INPUTS: dict[tuple[str, str], type[ExtendedInjector]] = {
    ('unsigned', 'max'): Uint8ActPerTensorFloat,
    ('unsigned', 'mse'): Uint8ActPerTensorFloatMSE,
    ('signed', 'max'): Int8ActPerTensorFloat,
    ('signed', 'mse'): Int8ActPerTensorFloatMSE,
    ('shifted', 'max'): ShiftedUint8ActPerTensorFloat,
    ('shifted', 'mse'): ShiftedUint8ActPerTensorFloatMSE,
}


def weight_quantizer(policy: LayerPolicy) -> Any:
    """Brevitas's injector for a layer's weights."""
    base = _WEIGHTS[policy.weight_granularity, policy.weight_symmetric, policy.scale_init]
    learned = policy.weight_scales == 'learned'
    kind = ScalingImplType.PARAMETER_FROM_STATS if learned else ScalingImplType.STATS
    return base.let(bit_width=policy.weight_bit_width, scaling_impl_type=kind)


def input_range(policy: LayerPolicy, *, nonnegative: bool) -> str:
    """``'unsigned'``, ``'signed'`` or ``'shifted'`` (unsigned with a zero point)."""
    if nonnegative:
        return 'unsigned'
    return 'signed' if policy.act_symmetric else 'shifted'


def input_quantizer(policy: LayerPolicy, *, nonnegative: bool) -> Any:
    """Brevitas's injector for a layer's input.

    Args:
        policy: How the layer is quantized.
        nonnegative: Whether the input cannot be negative.
    """
    base = _INPUTS[input_range(policy, nonnegative=nonnegative), policy.scale_init]
    return base.let(bit_width=policy.act_bit_width)
