"""The perturbation of quantized weights themselves: ``perturb_quantized`` (ours, after Liu et al. 2021).

Under a quantizer ``Q``, SAM's second pass is at ``Q(w + e)``: where ``e`` is small against a step, few integers change,
and those by whole steps. "Sharpness-aware Quantization for Deep Neural Networks" (arXiv 2111.12273) perturbs what the
network computes with: ``Q(w) + e``. Here ``e`` is SAM's, of the gradient that the straight-through estimator gives the
float weight. The float weights do not move, so the integers of the first pass hold in the second: weights are rounded
once a step, unless their scales are perturbed. That costs memory for them, 4 bytes a weight.

Quantized layers are those with a ``weight_quant``, as Brevitas has them; nothing of Brevitas is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class KeptIntegers:
    """What a quantizer of weights keeps from the first forward of a step for the others.

    Not an attribute of the module itself, whose attributes are put back before the second forward.
    """

    recording: bool = False
    values: Tensor | None = None  # the weights over their scale, rounded and not clamped


class QuantizedPerturbation:
    """Moves a perturbation from the float weights to what their quantizers give, and takes it away again."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._layers: list[Any] = []
        self._kept: list[KeptIntegers] = []

    def keep_integers(self, modules: Iterable[nn.Module]) -> None:
        """Before the first forward: find the quantized layers, and have them keep their integers if they can."""
        self._forget_integers()
        self._layers = list(filter(quantizes_weights, modules))
        for layer in self._layers:
            quantizer = _int_quant(layer)
            if hasattr(quantizer, 'kept'):
                quantizer.kept = quantizer.kept or KeptIntegers()
                quantizer.kept.recording = True
                self._kept.append(quantizer.kept)

    def _forget_integers(self) -> None:
        for kept in self._kept:
            kept.recording, kept.values = False, None
        self._kept = []

    @torch.no_grad()
    def apply(self, perturbed: Sequence[nn.Parameter], before: Mapping[Tensor, Tensor]) -> None:
        """Put quantized layers' weights back, and have their quantizers add what they were moved by.

        ``perturbed`` hold ``w + e``, and those of other layers are left as they are; ``before`` has their ``w``.
        """
        chosen = {id(parameter) for parameter in perturbed}
        for kept in self._kept:
            kept.recording = False
        for layer in self._layers:
            weight, quantizer = layer.weight, layer.weight_quant
            if any(id(other) in chosen for other in quantizer.parameters() if other is not weight):
                getattr(_int_quant(layer), 'kept', KeptIntegers()).values = None  # the scales have moved
            if id(weight) not in chosen:
                continue
            # The gradient is not needed any more: its memory takes e. Zero where the gradient was not finite.
            difference = torch.sub(weight, before[weight], out=weight.grad)
            weight.copy_(before[weight])
            self._handles.append(quantizer.register_forward_hook(partial(_add, difference)))

    def remove(self) -> None:
        """Undo :meth:`apply`, apart from the weights."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget_integers()


def quantizes_weights(layer: Any) -> bool:
    """Whether a layer multiplies by quantized weights."""
    # Not getattr, which takes long to find nothing; not `get`, which TorchScript's modules do not have.
    return 'weight_quant' in layer._modules and bool(getattr(layer.weight_quant, 'is_quant_enabled', False))


def _int_quant(layer: Any) -> Any:
    return getattr(getattr(layer.weight_quant, 'tensor_quant', None), 'int_quant', None)


def _add(difference: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return output._replace(value=output.value + difference.to(output.value.dtype))
