"""Whether post-training quantization leaves nothing of a model's accuracy, and where to look then (ours).

The float model's accuracy is measured only where that seems so, since it takes another pass over the validation set:
where half of the outputs of a batch are gone, or a metric is 0. Fine-tuning at few bits can win back a collapse; a
fault, in the weights, the data or the quantization, it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from mmengine.dist import broadcast
from torch import Tensor, nn

from .calibration import _forward as run_batch
from .float_outputs import without_quantizers
from .flow import evaluation, tensors_of

# Shares: of the outputs' size that their error has, and of the float model's metric that is left.
_OUTPUT_ERROR = 0.5
_METRIC_LEFT = 0.5
_LISTED = 3
# Parts of names of metrics that are the better the lower they are.
_ERRORS = ('epe', 'nme', 'mpjpe', 'mae', 'mse', 'loss', 'error')


class Collapse:
    """How far quantization changes one batch, layer by layer.

    Args:
        model: A calibrated model.
        batch: What a data loader delivers.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._layers: dict[str, tuple[float, float]] = {}
        with evaluation(model), torch.no_grad():
            with without_quantizers(model):
                expected = _flat(run_batch(model, batch))
            handles = [
                module.register_forward_hook(self._note(name, module))
                for name, module in model.named_modules()
                if isinstance(getattr(module, 'input_quant', None), ActQuantProxyFromInjectorBase)
            ]
            try:
                found = _flat(run_batch(model, batch))
            finally:
                for handle in handles:
                    handle.remove()
        # Every rank has a batch of its own, and all must evaluate the float model or none.
        error = torch.full((1,), _error(found, expected), device=expected.device)
        broadcast(error, src=0)
        self._output_error = float(error)

    def warning(self, metrics: Mapping[str, float], evaluate_float: Callable[[], Mapping[str, float]]) -> str | None:
        """What to say of a collapse, or None if there is none.

        Args:
            metrics: Those of the quantized model.
            evaluate_float: Measures those of the float model; called only if a collapse is possible.
        """
        judged = {name: value for name, value in metrics.items() if ' ' not in name}
        nothing = [name for name, value in judged.items() if not value > 0 and not _is_error(name)]
        if self._output_error < _OUTPUT_ERROR and not nothing:
            return None
        before = evaluate_float()
        for name, value in judged.items():
            if _collapsed(name, value, before[name]):
                return (
                    f'Post-training quantization takes {name} from {before[name]:.4f} to {value:.4f}. Look at the '
                    f'layers that it changes most, {self._worst()}: give them more bits, policy=dict(layers=[dict('
                    "pattern='^…$', weight_bit_width=8, act_bit_width=8)], …), or other scales (scale_init)"
                )
        if nothing and not before[nothing[0]] > 0:
            return (
                f'{nothing[0]} is {before[nothing[0]]:.4f} without the quantizers, too, so the quantizers are not '
                'the cause: look at the weights (is load_from a trained model of this recipe?) and '
                'at the validation set'
            )
        return None

    def _note(self, name: str, layer: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            given = args[0]
            errors = (
                _error(layer.quant_weight().value, layer.weight),
                _error(layer.input_quant(given).value, given),
            )
            self._layers[name] = max(errors, self._layers.get(name, (0.0, 0.0)), key=max)

        return hook

    def _worst(self) -> str:
        worst = sorted(self._layers.items(), key=lambda item: -max(item[1]))[:_LISTED]
        return ', '.join(f'{name} (weights by {w:.0%}, input by {x:.0%} of their size)' for name, (w, x) in worst)


def _collapsed(name: str, value: float, before: float) -> bool:
    if not math.isfinite(before) or not math.isfinite(value):
        return math.isfinite(before)
    if _is_error(name):
        return value * _METRIC_LEFT > before
    return before > 0 and value < _METRIC_LEFT * before


def _is_error(name: str) -> bool:
    return any(part in name.lower() for part in _ERRORS)


def _flat(outputs: Any) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(outputs)])


def _error(found: Tensor, expected: Tensor) -> float:
    """The size of the difference, as a share of the size of what was expected."""
    size, difference = float(expected.norm()), float((found - expected).norm())
    return difference / size if size else math.inf if difference else 0.0
