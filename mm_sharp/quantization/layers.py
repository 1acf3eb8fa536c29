"""Brevitas's layers without what nobody asks them for.

They hand tensors that carry scale, zero point and bit width to torch's functions, and work these out for their output,
by dozens of small operations and, on an accelerator, by waiting for it. Here no layer returns such a tensor: functions
get the values alone, which are the same.
"""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn


class _OnValues:
    """Comes before a layer of Brevitas."""

    def quant_weight(self, quant_input: Any = None, subtensor_slice_list: Any = None) -> Any:
        """The weights, quantized: whole, without a slice, whose backward pass would fill and copy a tensor."""
        quantizer = self.weight_quant  # type: ignore[attr-defined]
        if subtensor_slice_list is None and quantizer.is_quant_enabled and not quantizer.requires_quant_input:
            return quantizer(self.weight)  # type: ignore[attr-defined]
        return super().quant_weight(quant_input, subtensor_slice_list)  # type: ignore[misc]

    def inner_forward_impl(self, x: Any, quant_weight: Any, quant_bias: Any) -> Tensor:
        """The layer's function of values."""
        values = [item.value if isinstance(item, QuantTensor) else item for item in (x, quant_weight, quant_bias)]
        output: Tensor = super().inner_forward_impl(*values)  # type: ignore[misc]
        return output


class QuantConv1d(_OnValues, qnn.QuantConv1d):  # type: ignore[misc]
    """``nn.Conv1d``, quantized."""


class QuantConv2d(_OnValues, qnn.QuantConv2d):  # type: ignore[misc]
    """``nn.Conv2d``, quantized."""


class QuantConvTranspose1d(_OnValues, qnn.QuantConvTranspose1d):  # type: ignore[misc]
    """``nn.ConvTranspose1d``, quantized."""


class QuantConvTranspose2d(_OnValues, qnn.QuantConvTranspose2d):  # type: ignore[misc]
    """``nn.ConvTranspose2d``, quantized."""


class QuantLinear(_OnValues, qnn.QuantLinear):  # type: ignore[misc]
    """``nn.Linear``, quantized."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}
