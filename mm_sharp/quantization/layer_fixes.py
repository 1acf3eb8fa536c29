"""What Brevitas 0.13's layers need to train in float16 and to be copied (ours)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from brevitas.core.stats import stats_op
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn


def mend(layer: Any) -> None:
    """Mend a quantized layer, in place."""
    layer.input_quant.register_forward_pre_hook(_at_full_precision)
    _make_copyable(layer)


def _at_full_precision(proxy: nn.Module, args: tuple[Any, ...]) -> Any:
    """Quantize an input in the precision that its scale has, whatever autocast made of it.

    The gradient of a scale is a sum over x / scale**2, which float16 cannot hold where the range of an 8-bit input is
    below 1: it would be infinite at every loss scale, and no step would ever be taken.
    """
    (inputs,) = args
    scale = next(proxy.parameters(), None)
    if scale is None or not isinstance(inputs, torch.Tensor) or inputs.dtype == scale.dtype:
        return None
    return inputs.to(scale.dtype)


def _make_copyable(layer: nn.Module) -> None:
    """Have the searches for scales of least squared error act on the quantizers beside them, in copies too.

    Brevitas gives them closures over the layer that it built, which copies share: calibrating the copy of a model that
    was not calibrated would switch modes in the original, and recurse.
    """
    for proxy in layer.modules():
        if not isinstance(proxy, QuantProxyFromInjector):
            continue
        for search in proxy.modules():
            if isinstance(search, stats_op.MSE):
                before = search.previous_observer_mode
                search.set_local_loss_mode = partial(stats_op._set_local_loss_mode, proxy)
                search.set_observer_mode = partial(stats_op._set_observer_mode, proxy, previous_observer_mode=before)
                search.restore_observer_mode = partial(stats_op._restore_observer_mode, proxy, before)
                search.restore_offload_param = partial(stats_op._restore_params, proxy)
