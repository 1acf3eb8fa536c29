"""What a quantized model knows of itself: what was quantized, whether it is calibrated, which checkpoints fit it.

Of a float model's checkpoint only what belongs to quantizers may be missing. A quantized model's must have the same
bits in the same layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mm_sharp.errors import KindError, UserError, some
from mm_sharp.hooks.checkpoint import misshapen

from .policy import LayerPolicy, QuantizationPolicy
from .quantizers import SCALES, forget, uninitialised

# Name of the buffer that says, in a checkpoint, how its model is quantized.
LAYOUT = 'quantization_layout'
_RANGES = ('signed', 'unsigned', 'shifted')
_REMEDY = 'use the policy that it was trained with (it is in the config beside the checkpoint)'


class NotCalibratedError(UserError, RuntimeError):
    """A quantized model was used before its quantizers had scales."""


class CheckpointMismatchError(UserError):
    """A checkpoint does not fit the quantized model."""


@dataclass(frozen=True)
class LayerRecord:
    """One convolution, deconvolution or fully connected layer."""

    name: str
    kind: str  # class of the float layer
    policy: LayerPolicy | None  # None if it is not quantized
    input_range: str  # 'signed', 'unsigned' or 'shifted'; '' if it is not quantized
    reason: str  # why it is not quantized; '' if it is
    weights: int  # without biases
    point: str = ''  # name of what quantizes its input instead of the layer, if anything does


@dataclass
class QuantizationRecord:
    """How a model is quantized; ``model.quantization``."""

    policy: QuantizationPolicy
    layers: Sequence[LayerRecord]  # in the order of the model's definition
    batchnorms: Mapping[str, str]  # of those that were to be folded, why they could not be; '' if they were
    float_bytes: int  # size of the float model's parameters and statistics
    other_bytes: int  # of those that stay in float (biases, norms, layers that are not quantized)
    input_size: tuple[int, int]  # width and height in pixels that the model was traced with
    points: Mapping[str, str]  # by name, the ranges of activations between layers, in the order of the forward pass
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
        """(layers, 4) uint8: weight bits, input bits, range of the input, per-channel and symmetric weights.

        No input bits are those of a point, and no weight bits (in further rows) are a point.
        """
        rows = []
        for layer in self.layers:
            if layer.policy is not None:
                bits = (layer.policy.weight_bit_width, 0 if layer.point else layer.policy.act_bit_width)
                kind = 2 * (layer.policy.weight_granularity == 'channel') + layer.policy.weight_symmetric
                rows.append((*bits, _RANGES.index(layer.input_range), kind))
        rows += [(0, self.policy.of_points().act_bit_width, _RANGES.index(r), 0) for r in self.points.values()]
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
        shared = sum(bool(layer.point) for layer in self.layers)
        between = (
            f'for {self.policy.target}, {len(self.points)} activations between layers are quantized to 8 bits; '
            f'{shared} layers take them as they are, the others quantize their own input'
        )
        if self.policy.target == 'generic':
            between = (
                'activations, norms, residual sums, concatenations and what attention multiplies stay in float: each '
                'layer quantizes its own input'
            )
        lines += [
            f'{len(self.quantized)} of {len(self.layers)} layers are quantized, {weights:.1%} of their weights; '
            f'{len(self.folded)} BatchNorms are folded',
            f'size {self.float_bytes / 1e6:.2f} MB in float, {self.bytes() / 1e6:.2f} MB quantized '
            f'({self.float_bytes / self.bytes():.1f} times smaller)',
            between,
        ]
        return '\n'.join(lines)


def attach(model: nn.Module, record: QuantizationRecord) -> None:
    """Keep a record with its model, and have the model check what it loads and that it is calibrated when it runs."""
    model.quantization = record  # type: ignore[assignment]
    model.register_buffer(LAYOUT, record.layout())
    model._register_load_state_dict_pre_hook(_before_loading, with_module=True)
    model.register_load_state_dict_post_hook(_after_loading)
    model.register_forward_pre_hook(_check_call)


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The record of a quantized model, or None for others."""
    record = getattr(model, 'quantization', None)
    return record if isinstance(record, QuantizationRecord) else None


def quantized_record(model: nn.Module) -> QuantizationRecord:
    """The record of a quantized model; a KindError for others."""
    record = record_of(model)
    if record is None:
        raise KindError(
            f'model={type(model).__name__} is a float model: quantize it by a fragment, as '
            "_base_ = [RECIPE, 'mm_sharp::_base_/quantization/w8a8.py'], or build it with type='QuantizedModel'"
        )
    return record


def size_in_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in a state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def is_calibrated(model: nn.Module) -> bool:
    """Whether a model is quantized and all its quantizers have their scales."""
    return record_of(model) is not None and not uninitialised(model)


def check_calibrated(model: nn.Module) -> None:
    """Raise a NotCalibratedError if quantizers have no scale yet, and a TypeError for float models."""
    quantized_record(model)
    names = uninitialised(model)
    if names:
        raise NotCalibratedError(
            f'{len(names)} quantizers have no scale yet (the first is {names[0]}): the model has not been calibrated. '
            'Load the checkpoint of a quantized model (tools/ptq.py makes one of a float model), train with a Runner, '
            'which calibrates first (CalibrationHook), or call mm_sharp.quantization.calibrate(model, batches)'
        )


def _check_call(model: nn.Module, args: Any) -> None:
    # Brevitas would initialise a scale that it has not got in whatever forward pass comes next, without a word.
    record = quantized_record(model)
    if not record.calibrated and not record.calibrating:
        check_calibrated(model)
        record.calibrated = True


def _before_loading(model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Compare the checkpoint's bits with the model's, and keep what the other hook cannot see."""
    record = quantized_record(model)
    record.calibrated = False
    saved, ours = state.get(prefix + LAYOUT), record.layout()
    scales = any(SCALES in key for key in state if key.startswith(prefix))
    # The modules write into the last argument what does not fit in shape.
    model._loading = (prefix, saved is not None, scales, args[-1])  # type: ignore[assignment]
    if saved is not None and (saved.shape != ours.shape or not bool((saved.cpu() == ours).all())):
        raise CheckpointMismatchError(
            f'the checkpoint is of a model with {_summary(saved)}, and the config makes one with {_summary(ours)}: '
            f'{_REMEDY}'
        )


def _after_loading(model: nn.Module, keys: Any) -> None:
    """Report missing and unexpected keys; those of quantizers may be missing."""
    prefix, is_quantized, scales, errors = model.__dict__.pop('_loading', ('', False, False, []))
    if not is_quantized and prefix + LAYOUT in keys.missing_keys:
        keys.missing_keys.remove(prefix + LAYOUT)
    missing, unexpected = (
        [key[len(prefix) :] for key in found if key.startswith(prefix)]
        for found in (keys.missing_keys, keys.unexpected_keys)
    )
    missing = [key for key in missing if 'num_batches_tracked' not in key and not _of_quantizer(key)]
    if missing:
        raise CheckpointMismatchError(
            f'{len(missing)} weights of the model are not in the checkpoint (only those of quantizers may be missing): '
            f'{some(missing)}' + (f'; in it and not in the model are {some(unexpected)}' if unexpected else '')
        )
    if not is_quantized and not scales:
        forget(model)  # what calibration found for other weights
    without = uninitialised(model)
    if is_quantized and scales and without:
        raise CheckpointMismatchError(
            f'the checkpoint has no values for {len(without)} quantizers (the first is {without[0]}), and has some for '
            f'others: {_REMEDY}'
        )
    weights = [name for name, _ in model.named_parameters() if not _of_quantizer(name)]
    others = misshapen(errors)
    loaded = sum(prefix + name not in others for name in weights)
    count = f'all {loaded}' if loaded == len(weights) else f'{loaded} of {len(weights)}'
    message = f'Loaded the checkpoint of a {"quantized" if is_quantized else "float"} model: {count} weights, '
    message += f'{len(without)} quantizers to be calibrated' if without else 'all quantizers'
    message += f'; not used: {some(unexpected)}' if unexpected else ''
    print_log(message, 'current', logging.WARNING if unexpected else logging.INFO)


def _of_quantizer(key: str) -> bool:
    return SCALES in key or key == LAYOUT


def _summary(layout: Tensor) -> str:
    kinds = {True: 'layers W{0}A{1}', False: 'activations A{1}'}
    counts = Counter(kinds[bool(row[0])].format(row[0], row[1] or 8) for row in layout.tolist())
    return ', '.join(f'{count} {name}' for name, count in counts.items())
