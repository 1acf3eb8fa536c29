"""Scales from statistics: post-training quantization, and the start of training, by Brevitas's calibration.

Weights are at full precision while the inputs' statistics are collected; one forward pass after that initialises their
scales. If little is left of the accuracy, a warning says where it went; the float model's takes another validation, so
it is measured only where half of a batch's outputs are gone, or a metric is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from mmengine.dist import broadcast
from torch import Tensor, nn

from mm_sharp.errors import UserError

from .equalization import equalize as equalize_layers
from .flow import evaluation, flat, forward_hooks, run_batch, without_quantizers
from .learned_rounding import learn_rounding
from .quantizers import SCALES, forget
from .record import check_calibrated, quantized_record

# Shares: of the outputs' size that their error has, and of the float model's metric that is left.
_OUTPUT_ERROR = 0.5
_METRIC_LEFT = 0.5
_LISTED = 3
# Parts of names of metrics that are the better the lower they are.
_ERRORS = ('epe', 'nme', 'mpjpe', 'mrrpe', 'mae', 'mse', 'loss', 'error')


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    equalize: bool = False,
    learned_rounding: int = 0,
    bias_correction: bool = False,
) -> None:
    """Initialise all scales and zero points of a quantized model, anew if they were before.

    Args:
        model: Built by ``QuantizedModel``, with its float weights loaded. Its BatchNorms do not move meanwhile.
        batches: What a data loader delivers.
        equalize: Before anything else, equalize the ranges of channels (:mod:`mm_sharp.quantization.equalization`).
        learned_rounding: Steps in which each layer learns which weights to round up and which down, once the scales are
            there (:mod:`mm_sharp.quantization.learned_rounding`); 0: all go to the nearest integer.
        bias_correction: Afterwards add, to the biases of layers that have one, the mean error that quantization makes
            in their output (Nagel et al. 2019, arXiv 1906.04721, by Brevitas).

    Raises:
        ValueError: There is no batch, a scale is not finite, or the model cannot be equalized or its rounding not
            learned. The model is without scales then.
    """
    record = quantized_record(model)
    record.calibrated, record.calibrating = False, True
    forget(model)
    try:
        with evaluation(model), torch.no_grad():
            if equalize:
                equalize_layers(model)
            seen: list[Any] = []
            with calibration_mode(model):
                for batch in batches:
                    run_batch(model, batch)
                    seen = [*seen, batch] if bias_correction or learned_rounding else [batch]
            if not seen:
                raise UserError('calibration needs at least one batch')
            run_batch(model, seen[-1])
            for name, parameter in model.named_parameters():
                if SCALES in name and not bool(parameter.isfinite().all()):
                    raise UserError(
                        f'calibration: {name} is not finite: the weights or the images of the calibration batches hold '
                        'values that are not finite, or so large that the layers before it overflow'
                    )
            if learned_rounding:
                learn_rounding(model, seen, learned_rounding)
            if bias_correction:
                # Layers without a bias get none: a parameter that only some checkpoints have would fit neither model.
                with bias_correction_mode(model, skip_if_no_bias=True):
                    for batch in seen:
                        run_batch(model, batch)
    except BaseException:
        # Brevitas gives inputs of which it has seen nothing a scale of 1, and would not look at them again.
        forget(model)
        raise
    finally:
        record.calibrating = False
    check_calibrated(model)
    record.calibrated = True


def collapse_warning(
    model: nn.Module, batch: Any, metrics: Mapping[str, float], evaluate_float: Callable[[], Mapping[str, float]]
) -> str | None:
    """What to say of a collapse, or None. The float model is evaluated only if there may be one."""
    judged = {name: value for name, value in metrics.items() if ' ' not in name}
    nothing = [name for name, value in judged.items() if not value > 0 and not is_error(name)]
    output_error, layers = _errors(model, batch)
    if output_error < _OUTPUT_ERROR and not nothing:
        return None
    before = evaluate_float()
    for name, value in judged.items():
        if _collapsed(name, value, before[name]):
            worst = sorted(layers.items(), key=lambda item: -max(item[1]))[:_LISTED]
            changed = [f'{layer} (weights by {w:.0%}, input by {x:.0%} of their size)' for layer, (w, x) in worst]
            return (
                f'Post-training quantization takes {name} from {before[name]:.4f} to {value:.4f}. Look at the '
                f'layers that it changes most, {", ".join(changed)}: give them more bits, policy=dict(layers=[dict('
                "pattern='^…$', weight_bit_width=8, act_bit_width=8)], …), or other scales (scale_init)"
            )
    if nothing and not before[nothing[0]] > 0:
        return (
            f'{nothing[0]} is {before[nothing[0]]:.4f} without the quantizers, too, so the quantizers are not the '
            'cause: look at the weights (is load_from a trained model of this recipe?) and at the validation set'
        )
    return None


def _errors(model: nn.Module, batch: Any) -> tuple[float, dict[str, tuple[float, float]]]:
    """How far quantization changes the outputs for a batch and, by layer, its weights and its input."""
    layers: dict[str, tuple[float, float]] = {}

    def note(name: str, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        taken = layer.input_quant(args[0])  # or as it is, if it was quantized before
        weights = _error(layer.quant_weight().value, layer.weight)
        inputs = _error(getattr(taken, 'value', taken), args[0])
        layers[name] = max((weights, inputs), layers.get(name, (0.0, 0.0)), key=max)

    with evaluation(model), torch.no_grad():
        with without_quantizers(model):
            expected = flat(run_batch(model, batch))
        with forward_hooks(model, lambda _, module: isinstance(module, QuantWeightBiasInputOutputLayer), note):
            found = flat(run_batch(model, batch))
    # Every rank has a batch of its own, and all must evaluate the float model or none.
    error = torch.full((1,), _error(found, expected), device=expected.device)
    broadcast(error, src=0)
    return float(error), layers


def _collapsed(name: str, value: float, before: float) -> bool:
    if not math.isfinite(before) or not math.isfinite(value):
        return math.isfinite(before)
    if is_error(name):
        return value * _METRIC_LEFT > before
    return before > 0 and value < _METRIC_LEFT * before


def is_error(name: str) -> bool:
    """Whether a metric is the better the lower it is."""
    return any(part in name.lower() for part in _ERRORS)


def _error(found: Tensor, expected: Tensor) -> float:
    """The size of the difference, as a share of the size of what was expected."""
    size, difference = float(expected.norm()), float((found - expected).norm())
    return difference / size if size else math.inf if difference else 0.0
