"""Brevitas's quantizers: which of them a policy names, and whether they have their scales.

Weights: integers of one scale for each output channel or for the tensor. Inputs: one scale; unsigned where they cannot
be negative. Biases stay in float: they are added to accumulators, not multiplied.

Learned scales are parameters that calibration initialises, as in LSQ (Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from brevitas.core.stats import stats_op
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import ScalingImplType
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant import scaled_int, shifted_scaled_int
from torch import nn

from .int_quant import FusedIntQuant, FusedRescalingIntQuant
from .policy import LayerPolicy

SCALES = 'tensor_quant'  # in the names of all that belongs to a quantizer


def weight_quantizer(policy: LayerPolicy) -> Any:
    """Brevitas's injector for a layer's weights."""
    name = 'Int8' if policy.weight_symmetric else 'ShiftedUint8'
    base = _injector(f'{name}WeightPer{policy.weight_granularity.title()}Float', policy)
    scales = {'learned': ScalingImplType.PARAMETER_FROM_STATS, 'statistics': ScalingImplType.STATS}
    return base.let(bit_width=policy.weight_bit_width, scaling_impl_type=scales[policy.weight_scales])


def input_range(policy: LayerPolicy, *, nonnegative: bool) -> str:
    """``'unsigned'``, ``'signed'`` or ``'shifted'`` (unsigned with a zero point)."""
    if nonnegative:
        return 'unsigned'
    return 'signed' if policy.act_symmetric else 'shifted'


def input_quantizer(policy: LayerPolicy, *, nonnegative: bool) -> Any:
    """Brevitas's injector for a layer's input, which may be known to be nonnegative."""
    names = {'unsigned': 'Uint8', 'signed': 'Int8', 'shifted': 'ShiftedUint8'}
    base = _injector(f'{names[input_range(policy, nonnegative=nonnegative)]}ActPerTensorFloat', policy)
    return base.let(bit_width=policy.act_bit_width)


def _injector(name: str, policy: LayerPolicy) -> type[ExtendedInjector]:
    module = shifted_scaled_int if name.startswith('Shifted') else scaled_int
    found: type[ExtendedInjector] = getattr(module, name + ('MSE' if policy.scale_init == 'mse' else ''))
    if module is scaled_int:
        found = found.let(int_quant=FusedIntQuant, tensor_quant=FusedRescalingIntQuant)
    return found


def scale_gradients_as_lsq(layer: Any) -> None:
    """Have a layer's scales be trained at LSQ's pace."""
    for proxy, counted in ((layer.weight_quant, 'weights'), (layer.input_quant, 'features')):
        for module in proxy.modules():
            if isinstance(module, FusedIntQuant):
                module.lsq_counts = counted


def repair(layer: nn.Module) -> None:
    """Repair a layer of Brevitas 0.13: have it train in float16, and have its copies be calibrated by themselves.

    Searches for scales of least squared error switch the modes of the quantizer beside them. Brevitas gives them
    closures over the layer that it built: calibrating a copy would switch modes in the original, and recurse.
    """
    for proxy in layer.modules():
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled:
            proxy.register_forward_pre_hook(_at_full_precision)
        searches = proxy.modules() if isinstance(proxy, QuantProxyFromInjector) else ()
        for search in filter(lambda module: isinstance(module, stats_op.MSE), searches):
            before = search.previous_observer_mode
            search.set_local_loss_mode = partial(stats_op._set_local_loss_mode, proxy)
            search.set_observer_mode = partial(stats_op._set_observer_mode, proxy, previous_observer_mode=before)
            search.restore_observer_mode = partial(stats_op._restore_observer_mode, proxy, before)
            search.restore_offload_param = partial(stats_op._restore_params, proxy)


def _at_full_precision(proxy: nn.Module, args: tuple[Any, ...]) -> Any:
    """Quantize an input in the precision that its scale has, whatever autocast made of it.

    The gradient of a scale is a sum over x / scale**2, which float16 cannot hold where the range of an 8-bit input is
    below 1: no step would ever be taken.
    """
    (inputs,) = args
    scale = next(proxy.parameters(), None)
    return inputs if scale is None else inputs.to(scale.dtype)


def uninitialised(model: nn.Module) -> list[str]:
    """Names of the quantizers' scales and zero points that have no value yet."""
    return [
        name
        for name, module in _values(model)
        if not (module.init_done if hasattr(module, 'init_done') else module.counter > module.collect_stats_steps)
    ]


@torch.no_grad()
def forget(model: nn.Module) -> None:
    """Reset the quantizers' scales and zero points to what they are before calibration."""
    for name, module in _values(model):
        # Brevitas adds to the one and multiplies the other.
        start = 0.0 if 'zero_point' in name.rpartition('.')[2] else 1.0
        module.value.fill_(start)
        if hasattr(module, 'init_done'):
            module.init_done = False
        else:
            module.buffer.fill_(start)
            module.counter = 0
    for name, module in model.named_modules():
        if SCALES in name and hasattr(module, 'internal_candidate'):
            module.internal_candidate = None  # where the last search for a scale of least squared error ended


def _values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parts of Brevitas that hold a scale or a zero point: weights' know that it is there, inputs' count."""
    for name, module in model.named_modules():
        if SCALES in name and (hasattr(module, 'init_done') or hasattr(module, 'collect_stats_steps')):
            yield name, module
