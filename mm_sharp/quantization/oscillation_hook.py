"""Weights that oscillate between two integers in quantization-aware training, measured and frozen: a hook.

Close to the border between two integers the straight-through gradient pushes a weight to and fro (Nagel et al. 2022,
arXiv 2203.11086, sections 2.3 and 3). An oscillation, o = 1, is a change of the weight's integer in the direction
opposite to that of its last change; its frequency is the average f = m * o + (1 - m) * f over iterations.

Iterative weight freezing (the paper's second remedy): a weight whose f exceeds a threshold keeps one integer to the end
of the training, the one where it was most: its integers' average a = m * n + (1 - m) * a, rounded. As in the authors'
code, a is the average up to the iteration before, and only layers of at most 4 bits are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import Tensor, nn

from mm_sharp.errors import HOOK, UserError, check_number, check_positive_int
from mm_sharp.ops.model_call import unwrap

from .int_quant import FrozenWeights
from .record import record_of

SCALAR = 'train/oscillating_weights'
FROZEN = 'train/frozen_weights'
STATE = 'frozen_weights'  # in checkpoints
MOST_BITS = 4  # of weights that are frozen: at more bits a wrong integer matters little


@dataclass
class Oscillation:
    """How often each weight of a layer oscillates, and which are frozen."""

    integers: Tensor  # int16, of the last iteration
    direction: Tensor  # int8, of each weight's last change; 0: none yet
    frequency: Tensor  # float32; 0 of frozen weights
    average: Tensor  # float32, of the integers; of a frozen weight, its integer
    frozen: Tensor  # bool

    @classmethod
    def start(cls, integers: Tensor) -> Oscillation:
        """Nothing has changed yet."""
        none = torch.zeros_like(integers, dtype=torch.bool)
        return cls(integers, none.to(torch.int8), none.float(), integers.float(), none)

    def add(self, integers: Tensor, momentum: float, threshold: float = math.inf) -> None:
        """Note an iteration's integers, and freeze the weights whose frequency exceeds the threshold."""
        change = (integers - self.integers).sign().to(torch.int8)
        oscillates = (change * self.direction) < 0
        self.frequency.lerp_(oscillates.to(self.frequency), momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.integers = integers
        freezes = (self.frequency > threshold) & ~self.frozen
        following = torch.where(self.frozen, self.average, self.average.lerp(integers.float(), momentum))
        # In place: the layer's quantizer has the same tensors.
        self.average.copy_(torch.where(freezes, self.average.round(), following))
        self.frozen |= freezes
        self.frequency.masked_fill_(self.frozen, 0)


@HOOKS.register_module()
class OscillationHook(Hook):  # type: ignore[misc]
    """Log the share of a quantized model's weights that oscillate, ``train/oscillating_weights``; freeze them if told.

    It costs a quantization of all weights in each iteration, and 12 bytes a weight. A frozen weight stays ``scale *
    integer`` whatever the scale does: it gets no gradient, no perturbation and no weight decay; the scale gets its
    gradient. ``train/frozen_weights`` is logged as a share of all weights, and checkpoints hold the averages, so that a
    run resumes as if it had never stopped. Without ``freeze`` averages start anew when a run is resumed. In checkpoints
    an EMAHook's weights have the frozen integers, too. Models without quantized layers have nothing to log.

    Args:
        interval: Iterations from one logged value to the next; the averages have all iterations.
        momentum: m, the weight of an iteration in the averages.
        threshold: The frequency from which on a weight oscillates (the paper's).
        freeze: The frequency above which a weight is frozen, or a pair of them, from the first to the last iteration
            along a cosine; None: none is.

    Raises:
        ValueError: An argument is not allowed, or the model's weights have zero points or scales of statistics.
    """

    def __init__(
        self,
        interval: int = 10,
        momentum: float = 0.01,
        threshold: float = 0.005,
        freeze: float | Sequence[float] | None = None,
    ) -> None:
        name = type(self).__name__
        self.interval = check_positive_int(name, 'interval', interval, example='10', form=HOOK)
        limits: dict[str, Any] = {'low_open': True, 'high': 1.0, 'form': HOOK}
        self.momentum = check_number(name, 'momentum', momentum, example='0.01', **limits)
        self.threshold = check_number(name, 'threshold', threshold, example='0.005', **limits)
        # A list of another length is refused in the words for numbers.
        pair = isinstance(freeze, (list, tuple)) and len(freeze) == 2
        ends: Any = freeze if pair else () if freeze is None else (freeze,)
        self.freeze = [check_number(name, 'freeze', end, example='(0.04, 0.01)', **limits) for end in ends]
        self._layers: dict[str, Oscillation] = {}
        self._freezable: dict[str, Any] = {}  # the layers whose weights may be frozen
        self._loaded: dict[str, dict[str, Tensor]] | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take over what was frozen when a run resumes."""
        if self.freeze and runner._resume and not runner._has_loaded:
            self._loaded = checkpoint.get(STATE)
            if self._loaded is None:
                print_log(f'OscillationHook: no {STATE} in the checkpoint: averages start anew', 'current', WARNING)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save the averages, and what is frozen."""
        if self.freeze and self._layers:
            self._hold_in_averages(runner)
            checkpoint[STATE] = {name: dict(vars(layer)) for name, layer in self._layers.items()}

    def before_train(self, runner: Any) -> None:
        """Begin to average, or go on with it."""
        model = unwrap(runner.model)
        self._layers = {name: Oscillation.start(integers) for name, integers in weight_integers(model).items()}
        for name, saved in (self._loaded or {}).items():
            device = self._layers[name].integers.device
            self._layers[name] = Oscillation(**{key: value.to(device) for key, value in saved.items()})
        self._freezable = self._layers_to_freeze(model)
        for name, layer in self._freezable.items():
            _quantizer(layer).frozen = self._frozen(name)

    @torch.no_grad()
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note the integers, freeze what oscillates too often, and log the shares."""
        threshold = self._freeze_above((runner.iter + 1) / runner.max_iters) if self.freeze else math.inf
        for name, integers in weight_integers(unwrap(runner.model)).items():
            self._layers[name].add(integers, self.momentum, threshold if name in self._freezable else math.inf)
        for layer in self._freezable.values():
            # Whoever reads or saves frozen weights gets the values that they are quantized to.
            layer.weight.copy_(_quantizer(layer).frozen.applied_to(layer.weight, layer.quant_weight().scale))
        if self._layers and self.every_n_train_iters(runner, self.interval):
            runner.message_hub.update_scalar(SCALAR, self.share())
            if self.freeze:
                frozen = sum(layer.frozen.sum() for layer in self._layers.values())
                runner.message_hub.update_scalar(FROZEN, float(frozen) / self._weights())

    def after_train(self, runner: Any) -> None:
        """Leave nothing behind on the quantizers: the weights are what they were frozen at."""
        for layer in self._freezable.values():
            _quantizer(layer).frozen = None

    def share(self) -> float:
        """Of all weights, those that oscillate."""
        oscillating = sum((layer.frequency > self.threshold).sum() for layer in self._layers.values())
        return float(oscillating) / self._weights()

    def _weights(self) -> int:
        return sum(layer.frequency.numel() for layer in self._layers.values())

    def _freeze_above(self, progress: float) -> float:
        first, last = self.freeze[0], self.freeze[-1]
        return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2

    def _frozen(self, name: str) -> FrozenWeights:
        return FrozenWeights(self._layers[name].frozen, self._layers[name].average)

    @torch.no_grad()
    def _hold_in_averages(self, runner: Any) -> None:
        """Have the weights of an EMAHook, which are what is saved for use, quantize to the frozen integers, too.

        In validation the quantizers of the model, which has these weights then, hold the integers themselves. In place:
        the checkpoint may have these tensors already.
        """
        for hook in runner.hooks:
            for name in self._freezable if isinstance(hook, EMAHook) else ():
                averaged: Any = hook.ema_model.module.get_submodule(name)
                frozen = self._frozen(name)
                averaged.weight.copy_(frozen.applied_to(averaged.weight, averaged.quant_weight().scale))

    def _layers_to_freeze(self, model: nn.Module) -> dict[str, Any]:
        record = record_of(model)
        found = {}
        for layer in record.quantized if record and self.freeze else ():
            if layer.policy is None or layer.policy.weight_bit_width > MOST_BITS:
                continue
            if not layer.policy.weight_symmetric or layer.policy.weight_scales != 'learned':
                raise UserError(
                    f'OscillationHook: freeze={self.freeze} is not possible in {layer.name}: take freeze out, or write '
                    "sharp_quantization = dict(policy=dict(weight_symmetric=True, weight_scales='learned', ...))"
                )
            found[layer.name] = model.get_submodule(layer.name)
        return found


def _quantizer(layer: Any) -> Any:
    return layer.weight_quant.tensor_quant.int_quant


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
