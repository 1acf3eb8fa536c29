"""Scales from statistics: post-training quantization, and the start of training (ours, by Brevitas's calibration).

Weights are at full precision while the inputs' statistics are collected; the weights' own scales are initialised by one
forward pass after it. From then on nothing but BatchNorm's statistics changes in a forward pass: a second pass finds no
counter to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from torch import nn

from mm_sharp.errors import UserError

from .guard import check_calibrated, forget, record_of


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bias_correction: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Initialise all scales and zero points of a quantized model, anew if they were before.

    The model is in evaluation mode meanwhile, whatever its mode is, so that BatchNorm does not move.

    Args:
        model: Built by ``QuantizedModel``, with its float weights loaded.
        batches: What a data loader delivers.
        bias_correction: Afterwards add, to the biases of layers that have one, the mean error that quantization makes
            in their output (Nagel et al. 2019, arXiv 1906.04721, by Brevitas).
        progress: Called after each batch; with bias correction twice for each.

    Raises:
        ValueError: There is no batch, or a scale is not finite. The model is left without scales then, and whenever a
            batch fails.
        TypeError: The model is not quantized.
    """
    record = record_of(model)
    if record is None:
        check_calibrated(model)  # says what is wrong
    assert record is not None
    record.calibrated, record.calibrating = False, True
    forget(model)
    try:
        with _evaluation(model), torch.no_grad():
            seen = _collect(model, batches, progress, keep=bias_correction)
            _check_finite(model)
            if bias_correction:
                _correct_biases(model, seen, progress)
    except BaseException:
        # Brevitas gives inputs of which it has seen nothing a scale of 1, and would not look at them again.
        forget(model)
        raise
    finally:
        record.calibrating = False
    check_calibrated(model)
    record.calibrated = True


def _collect(model: nn.Module, batches: Iterable[Any], progress: Callable[[], None], *, keep: bool) -> list[Any]:
    """Run the batches, and set the scales; returns the batches, if they are to be kept, or the last one."""
    seen: list[Any] = []
    with calibration_mode(model):
        for batch in batches:
            _forward(model, batch)
            seen = [*seen, batch] if keep else [batch]
            progress()
    if not seen:
        raise UserError('calibration needs at least one batch')
    _forward(model, seen[-1])
    return seen


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if 'tensor_quant' in name and not bool(parameter.isfinite().all()):
            raise UserError(
                f'calibration: {name} is not finite: the weights or the images of the calibration batches hold values '
                'that are not finite, or so large that the layers before it overflow'
            )


def _correct_biases(model: nn.Module, batches: Sequence[Any], progress: Callable[[], None]) -> None:
    # Layers without a bias get none: a parameter that only some checkpoints have would fit neither model.
    with bias_correction_mode(model, skip_if_no_bias=True):
        for batch in batches:
            _forward(model, batch)
            progress()


def _forward(model: nn.Module, batch: Any) -> Any:
    """What inference runs, up to the head's raw output, which is returned."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    data = batch if preprocessor is None else preprocessor(batch, False)
    inputs = data['inputs'] if isinstance(data, dict) else data[0]
    return model(inputs, None, mode='tensor')


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
