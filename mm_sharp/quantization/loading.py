"""Checkpoints into quantized models: a float model's, or a quantized one's (ours).

Both are loaded by name. Of a float model's only what belongs to quantizers may be missing; a quantized model's must
have the same bits in the same layers, which its weights alone would not show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mm_sharp.errors import UserError

from .guard import forget, record_of, uninitialised
from .record import LAYOUT, summary


class CheckpointMismatchError(UserError):
    """A checkpoint does not fit the quantized model."""


def watch_loading(model: nn.Module) -> None:
    """Have a quantized model check every checkpoint that it loads, and report what it found."""
    model._register_load_state_dict_pre_hook(_before, with_module=True)
    model.register_load_state_dict_post_hook(_after)


def _before(model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Compare the bits, and remember what the other hook cannot see.

    Raises:
        CheckpointMismatchError: The checkpoint's model is quantized in another way.
    """
    record = record_of(model)
    assert record is not None
    record.calibrated = False
    saved = state.get(prefix + LAYOUT)
    scales = any('tensor_quant' in key for key in state if key.startswith(prefix))
    model._loading = (prefix, saved is not None, scales)  # type: ignore[assignment]
    ours = record.layout()
    if saved is not None and (saved.shape != ours.shape or not bool((saved.cpu() == ours).all())):
        raise CheckpointMismatchError(
            f'the checkpoint is of a model with {summary(saved)}, and the config makes one with {summary(ours)}: '
            'use the policy that it was trained with (it is in the config beside the checkpoint)'
        )


def _after(model: nn.Module, keys: Any) -> None:
    """Report missing and unexpected keys; those of quantizers may be missing.

    Raises:
        CheckpointMismatchError: Others are missing, or some of those of a quantized model.
    """
    prefix, is_quantized, scales = model.__dict__.pop('_loading', ('', False, False))
    if not is_quantized:
        _remove(keys.missing_keys, [key for key in keys.missing_keys if key == prefix + LAYOUT])
    missing = [k[len(prefix) :] for k in keys.missing_keys if k.startswith(prefix) and 'num_batches_tracked' not in k]
    unexpected = [k[len(prefix) :] for k in keys.unexpected_keys if k.startswith(prefix)]
    missing = [key for key in missing if not _of_quantizer(key)]
    if missing:
        raise CheckpointMismatchError(
            f'{len(missing)} weights of the model are not in the checkpoint (only those of quantizers may be missing): '
            f'{_some(missing)}' + (f'; in it and not in the model are {_some(unexpected)}' if unexpected else '')
        )
    if not is_quantized and not scales:
        forget(model)  # what calibration found for other weights
    waiting = len(uninitialised(model))
    if is_quantized and scales and waiting:
        raise CheckpointMismatchError(
            f'the checkpoint has no values for {waiting} quantizers (the first is {uninitialised(model)[0]}), and has '
            'some for others: use the policy that it was trained with (it is in the config beside the checkpoint)'
        )
    kind = 'a quantized model' if is_quantized else 'a float model'
    weights = sum(not _of_quantizer(name) for name, _ in model.named_parameters())
    message = f'Loaded the checkpoint of {kind}: all {weights} weights'
    message += f', {waiting} quantizers to be calibrated' if waiting else ', all quantizers'
    message += f'; not used: {_some(unexpected)}' if unexpected else ''
    print_log(message, logger='current', level=logging.WARNING if unexpected else logging.INFO)


def _of_quantizer(key: str) -> bool:
    return 'tensor_quant' in key or key == LAYOUT


def _remove(keys: list[str], these: Iterable[str]) -> None:
    for key in these:
        keys.remove(key)


def _some(keys: list[str], count: int = 5) -> str:
    return ', '.join(keys[:count]) + (f' and {len(keys) - count} more' if len(keys) > count else '')
