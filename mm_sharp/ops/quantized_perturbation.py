"""The perturbation of quantized weights themselves: ``perturb_quantized`` (ours, after Liu et al. 2021).

Under a quantizer ``Q``, SAM's second pass is at ``Q(w + e)``: where ``e`` is small against a step, few integers change,
and those by whole steps. "Sharpness-aware Quantization for Deep Neural Networks" (arXiv 2111.12273) perturbs what the
network computes with: ``Q(w) + e``. Here ``e`` is SAM's, of the gradient that the straight-through estimator gives the
float weight. The paper's further choices were not compared.

Quantized layers are those with a ``weight_quant``, as Brevitas has them; nothing of Brevitas is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class QuantizedPerturbation:
    """Moves a perturbation from the float weights to what their quantizers give, and takes it away again."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @torch.no_grad()
    def apply(self, model: nn.Module, perturbed: Sequence[nn.Parameter], before: Mapping[Tensor, Tensor]) -> None:
        """Put quantized layers' weights back, and have their quantizers add what they were moved by.

        Args:
            model: Where the layers are.
            perturbed: Parameters that hold ``w + e``; those of other layers are left as they are.
            before: Their ``w``.
        """
        chosen = {id(parameter) for parameter in perturbed}
        for layer in model.modules():
            weight = getattr(layer, 'weight', None)
            if not isinstance(weight, nn.Parameter) or id(weight) not in chosen or not quantizes_weights(layer):
                continue
            # The gradient is not needed any more: its memory takes e. Zero where the gradient was not finite.
            difference = torch.sub(weight, before[weight], out=weight.grad)
            weight.copy_(before[weight])
            quantizer: Any = layer.weight_quant
            self._handles.append(quantizer.register_forward_hook(partial(_add, difference)))

    def remove(self) -> None:
        """Undo :meth:`apply`, apart from the weights."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def quantizes_weights(layer: nn.Module) -> bool:
    """Whether a layer multiplies by quantized weights."""
    return bool(getattr(getattr(layer, 'weight_quant', None), 'is_quant_enabled', False))


def _add(difference: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return output._replace(value=output.value + difference.to(output.value.dtype))
