"""The losses of a part of a batch, as large as those of the whole batch, without the losses of single samples.

A loss that is the sum of its samples' must be scaled by N / K where only K of N samples run, or the step would shrink;
one that is their mean, or is divided by a count over the batch, must not. Which is which shows when the model runs once
on the same samples twice: what doubles is a sum. That works for every model, whatever its losses are made of, and has
to be done once in a training. (BatchNorm's statistics of a batch and of the batch twice are the same.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn

from mm_sharp.ops.fsdp import any_rank
from mm_sharp.per_sample_loss import Reduction


class LossScale:
    """Finds out which losses in a model's output are sums, and scales them.

    A loss that shows nothing, because it is zero or not finite, counts as what the others are; it is tried again in
    fewer and fewer steps.
    """

    def __init__(self) -> None:
        self.reductions: dict[str, Reduction] = {}
        self._twice: dict[str, float] | None = None
        self._unknown: set[str] = set()
        self._steps = 0
        self._kept = self._of = 1

    def next_step(self, kept: int, of: int) -> None:
        """Begin a step on ``kept``, K, ``of`` N samples."""
        self._twice, self._kept, self._of = None, kept, of

    def is_to_try(self, device: torch.device) -> bool:
        """Whether the model is to be tried before this step's forward.

        A forward may talk to the other processes, so all of them try or none: they ask each other, on the ``device`` of
        communication, in the same steps, fewer and fewer.
        """
        self._steps += 1
        if self._steps.bit_count() > 1:
            return False
        wanted = not self.reductions or bool(self._unknown)
        return wanted if get_world_size() == 1 else bool(any_rank(torch.tensor(wanted, device=device)))

    def expect(self, output: Any) -> None:
        """Take up what the model returned for the samples of the next forward, each of them twice."""
        self._twice = {name: float(value.detach().mean()) for name, value in _losses_in(output).items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Scale what ``model`` returns in this context, by the step's N / K."""
        depth = 0

        def before(*_: Any) -> None:
            nonlocal depth
            depth += 1

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal depth
            depth -= 1
            if depth or output is None:  # a call within the model's own, or one that has failed
                return None
            return self._scaled(output)

        handles = [
            model.register_forward_pre_hook(before, prepend=True),
            # First of the model's hooks: others are to see the losses that the step goes on with.
            model.register_forward_hook(after, prepend=True, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, str]:
        """Which losses are sums, and which are means; plain types."""
        return {name: reduction.value for name, reduction in self.reductions.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Replace what was found by what :meth:`state_dict` gave."""
        self.reductions = {name: Reduction(value) for name, value in state.items()}
        self._unknown, self._steps = set(), 0

    def _scaled(self, output: Any) -> Any:
        losses = _losses_in(output)
        if self._twice is not None:
            self._learn(losses, self._twice)
            self._twice = None
        self._unknown |= losses.keys() - self.reductions.keys()
        others = set(self.reductions.values())
        usual = others.pop() if len(others) == 1 else Reduction.MEAN
        factors = {name: self.reductions.get(name, usual).subset_factor(self._kept, self._of) for name in losses}
        if all(factor == 1.0 for factor in factors.values()):
            return None
        return _mapped(output, lambda name, loss: loss * factors[name])

    def _learn(self, once: Mapping[str, Tensor], twice: Mapping[str, float]) -> None:
        for name in once.keys() & twice.keys():
            one, two = float(once[name].detach().mean()), twice[name]
            if math.isfinite(one + two) and abs(one) > 1e-12:
                is_sum = abs(two - 2 * one) < abs(two - one)
                self.reductions[name] = Reduction.SUM if is_sum else Reduction.MEAN
        self._unknown -= self.reductions.keys()


def _losses_in(output: Any) -> dict[str, Tensor]:
    """The losses that ``parse_losses`` adds up, by name."""
    found: dict[str, Tensor] = {}
    _mapped(output, found.setdefault)
    return found


def _mapped(output: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """``output`` with its losses changed: tensors, and those in lists, of entries called a loss."""
    if isinstance(output, Tensor):
        return change('', output)
    result = dict(output) if isinstance(output, dict) else {}
    for name, value in result.items():
        if 'loss' in name and isinstance(value, Tensor):
            result[name] = change(name, value)
        elif 'loss' in name and isinstance(value, (list, tuple)):
            named = [(f'{name}.{i}', item) for i, item in enumerate(value)]
            result[name] = [change(key, item) if isinstance(item, Tensor) else item for key, item in named]
    return result
