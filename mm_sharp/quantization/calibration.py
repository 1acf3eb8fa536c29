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

from .guard import check_calibrated, record_of


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bias_correction: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Initialise all scales and zero points of a quantized model.

    The model is in evaluation mode meanwhile, whatever its mode is, so that BatchNorm does not move.

    Args:
        model: Built by ``QuantizedModel``, with its float weights loaded.
        batches: What a data loader delivers.
        bias_correction: Afterwards add, to the biases of layers that have one, the mean error that quantization makes
            in their output (Nagel et al. 2019, arXiv 1906.04721, by Brevitas).
        progress: Called after each batch; with bias correction twice for each.

    Raises:
        ValueError: There is no batch.
        TypeError: The model is not quantized.
    """
    record = record_of(model)
    if record is None:
        check_calibrated(model)  # says what is wrong
    assert record is not None
    seen: list[Any] = []
    record.calibrating = True
    try:
        with _evaluation(model), torch.no_grad():
            last = None
            with calibration_mode(model):
                for batch in batches:
                    _forward(model, batch)
                    last = batch
                    if bias_correction:
                        seen.append(batch)
                    progress()
            if last is None:
                raise ValueError('calibration needs at least one batch')
            _forward(model, last)
            if bias_correction:
                _correct_biases(model, seen, progress)
    finally:
        record.calibrating = False
    check_calibrated(model)
    record.calibrated = True


def _correct_biases(model: nn.Module, batches: Sequence[Any], progress: Callable[[], None]) -> None:
    # Layers without a bias get none: a parameter that only some checkpoints have would fit neither model.
    with bias_correction_mode(model, skip_if_no_bias=True):
        for batch in batches:
            _forward(model, batch)
            progress()


def _forward(model: nn.Module, batch: Any) -> None:
    """What inference runs, up to the head's raw output."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    data = batch if preprocessor is None else preprocessor(batch, False)
    inputs = data['inputs'] if isinstance(data, dict) else data[0]
    model(inputs, None, mode='tensor')


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
