"""What was quantized in a model, what was not and why: kept with the model and printed (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .policy import LayerPolicy, QuantizationPolicy

# Name of the buffer that says, in a checkpoint, how its model is quantized.
LAYOUT = 'quantization_layout'
_RANGES = ('signed', 'unsigned', 'shifted')


@dataclass(frozen=True)
class LayerRecord:
    """One convolution, deconvolution or fully connected layer.

    Args:
        name: Its dotted name.
        kind: Class of the float layer.
        policy: How it is quantized, or None if it is not.
        input_range: ``'signed'``, ``'unsigned'`` or ``'shifted'``; '' if it is not quantized.
        reason: Why it is not; '' if it is.
        weights: How many weights it has, without biases.
    """

    name: str
    kind: str
    policy: LayerPolicy | None
    input_range: str
    reason: str
    weights: int


@dataclass
class QuantizationRecord:
    """How a model is quantized; ``model.quantization``.

    Args:
        policy: What the config asked for.
        layers: Every layer with weights to multiply by, in the order of the model's definition.
        folded: Names of the BatchNorms that were folded into the layer before them.
        float_bytes: Size of the float model's parameters and statistics.
        other_bytes: Size of those that stay in float (biases, norms, layers that are not quantized).
        input_size: Width and height in pixels that the model was traced with.
        calibrated: Whether every quantizer is known to be initialised.
        calibrating: Whether statistics are being collected.
        unfolded: Names of the BatchNorms that were to be folded and could not be, and why.
    """

    policy: QuantizationPolicy
    layers: Sequence[LayerRecord]
    folded: Sequence[str]
    float_bytes: int
    other_bytes: int
    input_size: tuple[int, int]
    calibrated: bool = False
    calibrating: bool = False
    unfolded: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> list[LayerRecord]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if layer.policy is not None]

    def bytes(self) -> int:
        """The model's size when weights take the bits that they have and scales 4 bytes each."""
        bits = sum(layer.weights * layer.policy.weight_bit_width for layer in self.layers if layer.policy)
        return (bits + 7) // 8 + self.other_bytes

    def layout(self) -> Tensor:
        """(layers, 4) uint8: weight bits, input bits, range of the input, per-channel and symmetric weights."""
        rows = [
            (
                layer.policy.weight_bit_width,
                layer.policy.act_bit_width,
                _RANGES.index(layer.input_range),
                2 * (layer.policy.weight_granularity == 'channel') + layer.policy.weight_symmetric,
            )
            for layer in self.layers
            if layer.policy is not None
        ]
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
        for reason in dict.fromkeys(self.unfolded.values()):
            names = ', '.join(name for name, why in self.unfolded.items() if why == reason)
            lines.append(f'BatchNorm not folded, {reason}: {names}')
        return '\n'.join([*lines, *self._sums()])

    def _sums(self) -> list[str]:
        quantized = self.quantized
        total = sum(layer.weights for layer in self.layers) or 1
        share = sum(layer.weights for layer in quantized) / total
        return [
            f'{len(quantized)} of {len(self.layers)} layers are quantized, {share:.1%} of their weights; '
            f'{len(self.folded)} BatchNorms are folded',
            f'size {self.float_bytes / 1e6:.2f} MB in float, {self.bytes() / 1e6:.2f} MB quantized '
            f'({self.float_bytes / max(self.bytes(), 1):.1f} times smaller)',
            'activations, norms, residual sums, concatenations and what attention multiplies stay in float: each '
            'layer quantizes its own input',
        ]


def summary(layout: Tensor) -> str:
    """A checkpoint's layout in words: how many layers have which bits.

    Args:
        layout: What :meth:`QuantizationRecord.layout` gave.
    """
    counts: dict[str, int] = {}
    for weight, act, *_ in layout.tolist():
        counts[f'W{weight}A{act}'] = counts.get(f'W{weight}A{act}', 0) + 1
    return ', '.join(f'{count} layers {name}' for name, count in counts.items())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of a float model's parameters and of the buffers that its checkpoint holds."""
    saved = model.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values() if isinstance(tensor, Tensor))
