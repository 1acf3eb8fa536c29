"""Checkpoints into quantized models: hooks that check what is loaded, and report it.

Of a float model's checkpoint only what belongs to quantizers may be missing. A quantized model's must have the same
bits in the same layers, which its weights alone would not show.
"""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mm_sharp.errors import UserError, some

from .quantizers import SCALES, forget, uninitialised
from .record import LAYOUT, quantized_record, summary

_REMEDY = 'use the policy that it was trained with (it is in the config beside the checkpoint)'


class CheckpointMismatchError(UserError):
    """A checkpoint does not fit the quantized model."""


def before_loading(model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Compare the checkpoint's bits with the model's, and keep what the other hook cannot see."""
    record = quantized_record(model)
    record.calibrated = False
    saved, ours = state.get(prefix + LAYOUT), record.layout()
    scales = any(SCALES in key for key in state if key.startswith(prefix))
    model._loading = (prefix, saved is not None, scales)  # type: ignore[assignment]
    if saved is not None and (saved.shape != ours.shape or not bool((saved.cpu() == ours).all())):
        raise CheckpointMismatchError(
            f'the checkpoint is of a model with {summary(saved)}, and the config makes one with {summary(ours)}: '
            f'{_REMEDY}'
        )


def after_loading(model: nn.Module, keys: Any) -> None:
    """Report missing and unexpected keys; those of quantizers may be missing."""
    prefix, is_quantized, scales = model.__dict__.pop('_loading', ('', False, False))
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
    weights = sum(not _of_quantizer(name) for name, _ in model.named_parameters())
    print_log(
        f'Loaded the checkpoint of a {"quantized" if is_quantized else "float"} model: all {weights} weights, '
        + (f'{len(without)} quantizers to be calibrated' if without else 'all quantizers')
        + (f'; not used: {some(unexpected)}' if unexpected else ''),
        logger='current',
        level=logging.WARNING if unexpected else logging.INFO,
    )


def _of_quantizer(key: str) -> bool:
    return SCALES in key or key == LAYOUT
