"""Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1), by Brevitas, before calibration.

Where a layer's output reaches the next layers through ReLU, pooling and sums alone, channel c of it may be divided by
any s_c > 0 if the next layers multiply theirs by s_c: the network computes the same. Brevitas chooses s_c so that the
weights before and after have the same range in each channel, which per-tensor scales and inputs gain from. SiLU, ReLU6
and the like have no such freedom: layers around them stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from operator import attrgetter
from typing import Any

import torch
from brevitas.graph.equalize import EqualizeGraph
from mmengine.logging import print_log
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.errors import UnsupportedError

from .flow import LAYERS, float_output, is_rounding, noise_of
from .record import quantized_record


class _Network(nn.Module):
    """From the picture to all of the head's outputs, for the tracer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs, None, mode='tensor')


class _Tracer(fx.Tracer):
    """Layers are not looked into: Brevitas's are no leaves to torch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*LAYERS, _BatchNorm)) or type(m).__module__.startswith('brevitas.')
        return known or super().is_leaf_module(m, module_qualified_name)


def equalize(model: nn.Module) -> int:
    """Equalize a quantized model that is not calibrated, in evaluation mode, in place; returns how many groups were.

    Raises UnsupportedError: The model cannot be traced, or would compute something else. Its weights are as before.
    """
    width, height = quantized_record(model).input_size
    inputs = noise_of(model, width, height)
    expected = float_output(model, inputs)
    network = _Network(model)
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a model's code raises on proxies
        reason = ' '.join(str(error).split('\n')[0].split())
        raise UnsupportedError(
            f'{type(model).__name__} cannot be equalized: torch.fx cannot trace it ({reason}). Leave equalization out'
        ) from error
    targets = {str(node.target) for node in graph.nodes if node.op in ('call_module', 'get_attr')}
    copies = {name: _copied(attrgetter(name)(network)) for name in targets}
    _, regions = EqualizeGraph(return_regions=True).apply(fx.GraphModule(copies, graph))
    pairs = [
        (ours, copies[name].get_parameter(leaf))
        for name in targets
        if isinstance(copies[name], nn.Module)
        for leaf, ours in network.get_submodule(name).named_parameters(recurse=False)
    ]
    _exchange(pairs)
    if not is_rounding(float_output(model, inputs), expected):
        _exchange(pairs)
        raise UnsupportedError(f'{type(model).__name__} cannot be equalized: it would compute something else')
    print_log(f'Equalized the channels of {len(regions)} groups of layers', 'current')
    return len(regions)


def _copied(value: Any) -> Any:
    """A layer without its quantizers, with weights of its own: Brevitas makes new parameters, and for each of them new
    quantizers. Others as they are.
    """
    if not isinstance(value, (*LAYERS, _BatchNorm)):
        return value
    layer = copy(value)
    layer._modules = {}
    layer._parameters = {
        name: parameter if parameter is None else nn.Parameter(parameter.detach().clone())
        for name, parameter in value._parameters.items()
    }
    return layer


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for ours, theirs in pairs:
        before = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(before)
