"""Weights that oscillate between two integers in quantization-aware training, measured: a hook.

Close to the border between two integers the straight-through gradient pushes a weight to and fro (Nagel et al. 2022,
arXiv 2203.11086, sections 2.3 and 3). An oscillation, o = 1, is a change of the weight's integer in the direction
opposite to that of its last change; its frequency is the average f = m * o + (1 - m) * f over iterations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from mm_sharp.errors import HOOK, check_number, check_positive_int

from .record import record_of

SCALAR = 'train/oscillating_weights'


@dataclass
class Oscillation:
    """How often each weight of a layer oscillates."""

    integers: Tensor  # int16, of the last iteration
    direction: Tensor  # int8, of each weight's last change; 0: none yet
    frequency: Tensor  # float32

    @classmethod
    def start(cls, integers: Tensor) -> Oscillation:
        """Nothing has changed yet."""
        return cls(
            integers, torch.zeros_like(integers, dtype=torch.int8), torch.zeros(integers.shape).to(integers.device)
        )

    def add(self, integers: Tensor, momentum: float) -> None:
        """Note an iteration's integers."""
        change = (integers - self.integers).sign().to(torch.int8)
        oscillates = (change * self.direction) < 0
        self.frequency.lerp_(oscillates.to(self.frequency), momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.integers = integers


@HOOKS.register_module()
class OscillationHook(Hook):  # type: ignore[misc]
    """Log the share of a quantized model's weights that oscillate, as ``train/oscillating_weights``.

    It costs a quantization of all weights in each iteration, and 7 bytes a weight. Averages start anew when a run is
    resumed. Models without quantized layers have nothing to log.

    Args:
        interval: Iterations from one logged value to the next; the averages have all iterations.
        momentum: m, the weight of an iteration in the average.
        threshold: The frequency from which on a weight oscillates (the paper's).
    """

    def __init__(self, interval: int = 10, momentum: float = 0.01, threshold: float = 0.005) -> None:
        name = type(self).__name__
        self.interval = check_positive_int(name, 'interval', interval, example='10', form=HOOK)
        limits: dict[str, Any] = {'low_open': True, 'high': 1.0, 'form': HOOK}
        self.momentum = check_number(name, 'momentum', momentum, example='0.01', **limits)
        self.threshold = check_number(name, 'threshold', threshold, example='0.005', **limits)
        self._layers: dict[str, Oscillation] = {}

    def before_train(self, runner: Any) -> None:
        """Begin to average."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._layers = {name: Oscillation.start(integers) for name, integers in weight_integers(model).items()}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note the integers, and log the share."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for name, integers in weight_integers(model).items():
            self._layers[name].add(integers, self.momentum)
        if self._layers and self.every_n_train_iters(runner, self.interval):
            runner.message_hub.update_scalar(SCALAR, self.share())

    def share(self) -> float:
        """Of all weights, those that oscillate."""
        oscillating = sum((layer.frequency > self.threshold).sum() for layer in self._layers.values())
        return float(oscillating) / sum(layer.frequency.numel() for layer in self._layers.values())


@torch.no_grad()
def weight_integers(model: nn.Module) -> dict[str, Tensor]:
    """The integers of each quantized layer's weights, int16; none for float models."""
    record = record_of(model)
    found = {}
    for layer in record.quantized if record else ():
        module: Any = model.get_submodule(layer.name)
        quantized = module.quant_weight()
        integers = quantized.value / quantized.scale + quantized.zero_point
        found[layer.name] = integers.round().to(torch.int16)
    return found
