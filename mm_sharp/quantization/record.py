"""What was quantized in a model, what was not and why: kept with the model and printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .policy import LayerPolicy, QuantizationPolicy

# Name of the buffer that says, in a checkpoint, how its model is quantized.
LAYOUT = 'quantization_layout'
_RANGES = ('signed', 'unsigned', 'shifted')


@dataclass(frozen=True)
class LayerRecord:
    """One convolution, deconvolution or fully connected layer."""

    name: str
    kind: str  # class of the float layer
    policy: LayerPolicy | None  # None if it is not quantized
    input_range: str  # 'signed', 'unsigned' or 'shifted'; '' if it is not quantized
    reason: str  # why it is not quantized; '' if it is
    weights: int  # without biases


@dataclass
class QuantizationRecord:
    """How a model is quantized; ``model.quantization``."""

    policy: QuantizationPolicy
    layers: Sequence[LayerRecord]  # in the order of the model's definition
    batchnorms: Mapping[str, str]  # of those that were to be folded, why they could not be; '' if they were
    float_bytes: int  # size of the float model's parameters and statistics
    other_bytes: int  # of those that stay in float (biases, norms, layers that are not quantized)
    input_size: tuple[int, int]  # width and height in pixels that the model was traced with
    calibrated: bool = False  # whether every quantizer is known to be initialised
    calibrating: bool = False

    @property
    def quantized(self) -> list[LayerRecord]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if layer.policy is not None]

    @property
    def folded(self) -> list[str]:
        """The BatchNorms that were folded into the layer before them."""
        return [name for name, reason in self.batchnorms.items() if not reason]

    def bytes(self) -> int:
        """The model's size when weights take the bits that they have and scales 4 bytes each."""
        bits = sum(layer.weights * layer.policy.weight_bit_width for layer in self.layers if layer.policy)
        return (bits + 7) // 8 + self.other_bytes

    def layout(self) -> Tensor:
        """(layers, 4) uint8: weight bits, input bits, range of the input, per-channel and symmetric weights."""
        rows = []
        for layer in self.layers:
            if layer.policy is not None:
                bits = (layer.policy.weight_bit_width, layer.policy.act_bit_width)
                kind = 2 * (layer.policy.weight_granularity == 'channel') + layer.policy.weight_symmetric
                rows.append((*bits, _RANGES.index(layer.input_range), kind))
        # Not int16, which neither gloo nor NCCL can send to other ranks.
        return torch.tensor(rows, dtype=torch.uint8).view(-1, 4)

    def table(self) -> str:
        """The report: a line for each layer, and sums."""
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f'{"layer":<{width}}  weights  bits  input']
        for layer in self.layers:
            count = f'{layer.weights:>7,}' if layer.weights < 10**6 else f'{layer.weights / 10**6:>6.2f}M'
            how = f'float           {layer.reason}'
            if layer.policy is not None:
                how = f'{layer.policy.weight_bit_width:>4}  {layer.policy.act_bit_width} {layer.input_range}'
            lines.append(f'{layer.name:<{width}}  {count}  {how}')
        for reason in dict.fromkeys(filter(None, self.batchnorms.values())):
            names = ', '.join(name for name, why in self.batchnorms.items() if why == reason)
            lines.append(f'BatchNorm not folded, {reason}: {names}')
        weights = sum(layer.weights for layer in self.quantized) / sum(layer.weights for layer in self.layers)
        return '\n'.join(
            [
                *lines,
                f'{len(self.quantized)} of {len(self.layers)} layers are quantized, {weights:.1%} of their weights; '
                f'{len(self.folded)} BatchNorms are folded',
                f'size {self.float_bytes / 1e6:.2f} MB in float, {self.bytes() / 1e6:.2f} MB quantized '
                f'({self.float_bytes / self.bytes():.1f} times smaller)',
                'activations, norms, residual sums, concatenations and what attention multiplies stay in float: each '
                'layer quantizes its own input',
            ]
        )


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The record of a quantized model, or None for others."""
    record = getattr(model, 'quantization', None)
    return record if isinstance(record, QuantizationRecord) else None


def quantized_record(model: nn.Module) -> QuantizationRecord:
    """The record of a quantized model; a TypeError for others."""
    record = record_of(model)
    if record is None:
        raise TypeError(f"{type(model).__name__} is not quantized: build it with type='QuantizedModel'")
    return record


def summary(layout: Tensor) -> str:
    """The layout of a checkpoint's model in words: how many layers have which bits."""
    counts = Counter(f'W{weight}A{act}' for weight, act, *_ in layout.tolist())
    return ', '.join(f'{count} layers {name}' for name, count in counts.items())


def size_in_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in a state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
