"""How far the weights are perturbed, and where, for whoever has to choose ``rho``: the log, and warnings.

A radius that fits one model destroys another: what counts is its size relative to the weights, and how much of it falls
on which part. See ``docs/scale.md``.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from itertools import pairwise
from statistics import mean, median

from mmengine.logging import print_log
from torch import nn

from mm_sharp.errors import RECOMMENDED
from mm_sharp.hooks.scale import Part, Scale, scale_of
from mm_sharp.ops.parameters import parameters_of
from mm_sharp.ops.perturbation import BY_TENSOR
from mm_sharp.ops.quantized_perturbation import quantizes_weights
from mm_sharp.step.timing import StepRecord
from mm_sharp.step.wrapper import TwoPassOptimWrapper

_MOST_PARTS = 5  # in the log, so that it stays readable; what is left is put together
# Nearly all of the perturbation is in a part with little of the weights: with three quarters of its squared norm there,
# all the rest of the model moves by half of rho, and that part by 8 times as much of itself as the whole does.
_NEARLY_ALL, _LITTLE = 0.75, 0.1
# The loss rises by less than a tenth of what it differs by from one batch to the next, and by hardly anything of itself
# (with small batches it differs by much).
_OF_THE_NOISE, OF_THE_LOSS = 0.1, 0.005
# The loss more than triples, by more than half of what it was at first: late in a training, where the loss is nearly
# zero, many times as much is still little.
_TIMES, _OF_THE_FIRST = 3.0, 0.5
# Or it rises by less than a quarter of what the gradient says, where that is a noticeable part of it: w + e is beyond
# what the gradient at w knows. So it is with losses that cannot rise by much, such as those of heatmaps. (Under
# quantizers, a small perturbation may change no integer.)
_OF_THE_GRADIENT, _NOTICEABLE = 0.25, 0.02
# Logged steps that a warning looks back on: what is seen at once (in the very first ones nearly all of the gradient is
# in a head that knows nothing), and what needs a mean. As many again come before that mean: while a learning rate warms
# up, hardly any perturbation raises the loss.
_FEW, _MANY = 5, 20

_MEASURED = f"{RECOMMENDED} (rho as a share of each tensor's norm)"


class ScaleReport:
    """Tells what a wrapper perturbs in the user's own ``model``: at the start, in the log's scalars, and in warnings.

    Each warning comes once. ``introduced``: whether it was said what is perturbed.
    """

    def __init__(self, wrapper: TwoPassOptimWrapper, model: nn.Module) -> None:
        self._wrapper = wrapper
        self._model = model
        self._owner = type(wrapper).__name__
        self._shown: list[str] | None = None
        self._losses: deque[tuple[float, float]] = deque(maxlen=2 * _MANY)
        self._crowded: deque[set[str]] = deque(maxlen=_FEW)
        self._expected: deque[float] = deque(maxlen=_FEW)
        self._first = 0.0
        self._said: set[str] = set()
        self.introduced = False

    def scale(self, step: StepRecord) -> Scale | None:
        """The sizes of a step's perturbation; None where it has none, or was not measured."""
        if step.sizes is None or step.grad_norm is None or not math.isfinite(float(step.grad_norm)):
            return None
        return scale_of(step.sizes, self._model)

    def introduce(self, step: StepRecord) -> None:
        """Say once what is perturbed, by the first step that perturbs anything."""
        scale = self.scale(step)
        if scale is None:
            return
        self.introduced, self._first = True, float(step.loss)
        trained = sum(parameter.requires_grad for parameter in parameters_of(self._wrapper.optimizer))
        line = (
            f'{self._owner}: the first step perturbs {scale.tensors} of {trained} tensors, by '
            f"{_percent(scale.relative)} of the weights' norm"
        )
        if scale.whole.perturbation:
            largest = max(scale.layers, key=scale.share)
            line += f'; {_percent(scale.share(largest))} of the perturbation is in {largest.name}'
        print_log(line, logger='current', level=logging.INFO)

    def log_scalars(self, step: StepRecord) -> dict[str, float]:
        """``rho_relative``, and ``share_…`` of the model's parts, where it has several; may warn."""
        scale = self.scale(step)
        if scale is None:
            return {}
        self._warn(step, scale)
        scalars = {'rho_relative': scale.relative}
        if scale.slope and step.perturbed_loss is not None and self._wrapper.same_samples:
            scalars['linearity'] = (float(step.perturbed_loss) - float(step.loss)) / scale.slope
        if len(scale.parts) > 1:
            scalars |= self._shares(scale)
        return scalars

    def _shares(self, scale: Scale) -> dict[str, float]:
        """The shares of always the same parts: all, or those that had most at first, and the rest."""
        if self._shown is None:
            ranked = sorted(scale.parts, key=scale.share, reverse=True)
            kept = ranked if len(ranked) <= _MOST_PARTS else ranked[: _MOST_PARTS - 1]
            self._shown = [part.name for part in kept]
        shares = dict.fromkeys(map(_share_key, self._shown), 0.0)
        for part in scale.parts:
            key = _share_key(part.name) if part.name in self._shown else 'share_rest'
            shares[key] = shares.get(key, 0.0) + scale.share(part)
        return shares

    # ---------------------------------------------------------------- warnings
    def _warn(self, step: StepRecord, scale: Scale) -> None:
        self._warn_of_one_part(scale)
        if step.perturbed_loss is None or not self._wrapper.same_samples or not self._wrapper.rho:
            return
        loss, perturbed = float(step.loss), float(step.perturbed_loss)
        if not math.isfinite(loss) or not math.isfinite(perturbed):
            return  # which is logged elsewhere
        self._losses.append((loss, perturbed - loss))
        self._expected.append(scale.slope)
        self._warn_of_too_little(scale)
        self._warn_of_too_much(scale)

    def _warn_of_one_part(self, scale: Scale) -> None:
        if self._wrapper.settings.adaptive in BY_TENSOR or not scale.whole.perturbation:
            return
        little = _LITTLE * scale.whole.weights
        found = {
            part.name: part
            for part in (*scale.parts, *scale.layers)
            if scale.share(part) > _NEARLY_ALL and part.weights < little
        }
        self._crowded.append(set(found))
        always = set.intersection(*self._crowded)
        if len(self._crowded) < _FEW or not always:
            return
        part = found[max(always, key=len)]  # the layer, if it is in a single one
        layer = max((each for each in scale.layers if scale.share(each) > _LITTLE), key=_moved, default=part)
        own = f'by {_percent(_moved(layer))} of its norm' if layer.weights else 'away from zero'
        self._say(
            'one part',
            f'{_percent(scale.share(part))} of the perturbation is in {part.name}, which has '
            f"{_percent(part.weights / scale.whole.weights)} of the weights' norm: the rest of the model is hardly "
            f'perturbed, while {layer.name} is moved {own}. Write {_MEASURED}, or leave it out: '
            rf"perturb=dict(exclude=[r'\b{re.escape(part.name)}\b'])",
        )

    def _warn_of_too_little(self, scale: Scale) -> None:
        losses, rises = zip(*list(self._losses)[-_MANY:], strict=True)
        # Between neighbours, so that a loss that falls in the course of training is not taken for noise.
        squares = [(later - earlier) ** 2 for earlier, later in pairwise(losses)]
        noise = math.sqrt(mean(squares) / 2) if squares else 0.0
        little = mean(rises) < min(_OF_THE_NOISE * noise, OF_THE_LOSS * abs(mean(losses)))
        if len(self._losses) == 2 * _MANY and little:
            self._say(
                'too little',
                f"rho={self._wrapper.rho:g} is negligible: at {_percent(scale.relative)} of the weights' norm, the "
                f'perturbation has changed the loss by {mean(rises):.2g} in the mean of the last {_MANY} logged steps, '
                f'and from batch to batch it differs by {noise:.2g}. Write {self._way_out("larger", 5)}',
            )

    def _warn_of_too_much(self, scale: Scale) -> None:
        last = list(self._losses)[-_FEW:]
        loss, rise = median(loss for loss, _ in last), median(rise for _, rise in last)
        expected = median(self._expected)
        steep = rise > (_TIMES - 1) * abs(loss) and rise > _OF_THE_FIRST * abs(self._first)
        quantized = any(map(quantizes_weights, self._model.modules()))
        rounds = quantized and not self._wrapper.settings.perturb_quantized
        flat = not rounds and rise < _OF_THE_GRADIENT * expected and expected > _NOTICEABLE * abs(loss)
        if len(last) == _FEW and (steep or flat):
            instead = f', and not by the {expected:.2g} that the gradient says' if flat else ''
            self._say(
                'too much',
                f"rho={self._wrapper.rho:g} leaves the neighbourhood: at {_percent(scale.relative)} of the weights' "
                f'norm, the perturbation changes the loss of {loss:.3g} by {rise:+.2g}{instead} (medians of the last '
                f'{_FEW} logged steps). Write {self._way_out("smaller", 0.2)}',
            )

    def _way_out(self, which: str, factor: float) -> str:
        """What to write in place of the present scale."""
        other = f'a {which} rho, such as rho={self._wrapper.rho * factor:.2g}'
        return other if self._wrapper.settings.adaptive == 'tensor' else f'{_MEASURED}, or {other}'

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            print_log(f'{self._owner}: {message}. See docs/scale.md', logger='current', level=logging.WARNING)


def _share_key(name: str) -> str:
    """The scalar of a part: of one called ``seen``, it must not be that of the samples that were seen."""
    return f'share_{name}_part' if name in ('rest', 'seen') else f'share_{name}'


def _moved(part: Part) -> float:
    """How far a part is moved, as a share of its own norm."""
    return part.perturbation / part.weights if part.weights else math.inf


def _percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share > 0.095 else f'{100 * share:.2g} %'
