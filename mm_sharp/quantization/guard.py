"""Whether a quantized model's quantizers are initialised, and a refusal to run it while they are not (ours).

Brevitas initialises a scale that it has not got in the next forward pass, whatever that is: in training, in the middle
of a sharpness-aware step, or in an export, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mm_sharp.errors import UserError

from .record import QuantizationRecord


class NotCalibratedError(UserError, RuntimeError):
    """A quantized model was used before its quantizers had scales."""


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The record of a quantized model, or None for others."""
    record = getattr(model, 'quantization', None)
    return record if isinstance(record, QuantizationRecord) else None


def uninitialised(model: nn.Module) -> list[str]:
    """Names of the quantizers' scales and zero points that have no value yet."""
    return [name for name, module in _values(model) if not _has_value(module)]


@torch.no_grad()
def forget(model: nn.Module) -> None:
    """Take the quantizers' scales and zero points back to what they are before calibration."""
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
        if 'tensor_quant' in name and hasattr(module, 'internal_candidate'):
            module.internal_candidate = None  # where the last search for a scale of least squared error ended


def is_calibrated(model: nn.Module) -> bool:
    """Whether a model is quantized and all its quantizers have their scales."""
    return record_of(model) is not None and not uninitialised(model)


def check_calibrated(model: nn.Module) -> None:
    """Raise unless a quantized model can be used.

    Raises:
        NotCalibratedError: Quantizers have no scale yet.
        TypeError: The model is not quantized.
    """
    if record_of(model) is None:
        raise TypeError(f"{type(model).__name__} is not quantized: build it with type='QuantizedModel'")
    names = uninitialised(model)
    if names:
        raise NotCalibratedError(
            f'{len(names)} quantizers have no scale yet (the first is {names[0]}): the model has not been calibrated. '
            'Load the checkpoint of a quantized model, train with a Runner, which calibrates first (CalibrationHook), '
            'or call mm_sharp.quantization.calibrate(model, batches)'
        )


def watch_calls(model: nn.Module) -> None:
    """Have a quantized model refuse to run before it is calibrated."""
    model.register_forward_pre_hook(_check_call)


def _check_call(model: nn.Module, args: Any) -> None:
    record = record_of(model)
    if record is not None and not record.calibrated and not record.calibrating:
        check_calibrated(model)
        record.calibrated = True


def _values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parts of Brevitas that hold a scale or a zero point: weights' know that it is there, inputs' count."""
    for name, module in model.named_modules():
        if 'tensor_quant' in name and (hasattr(module, 'init_done') or hasattr(module, 'collect_stats_steps')):
            yield name, module


def _has_value(module: Any) -> bool:
    if hasattr(module, 'init_done'):
        return bool(module.init_done)
    return bool(module.counter > module.collect_stats_steps)
