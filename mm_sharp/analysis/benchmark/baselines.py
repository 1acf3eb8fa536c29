"""SAM as it is written without this package: by hand around the training step, and by another package.

Both run on the same model, batch, optimizer and precision as the methods here. What they leave out: the second pass
moves BatchNorm's statistics a second time, dropout draws other masks in it, and neither asks whether values are finite.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mm_sharp.analysis.benchmark.steps import Candidate, loss_of
from mm_sharp.errors import UsageError
from mm_sharp.step.timing import StepTimer

BASELINES = BY_HAND, LIBRARY = 'sam by hand', 'pytorch_optimizer.SAM'


class HandWrittenSAM:
    """SAM as many write it: a loop over the parameters, and a clone of each, made anew in every step."""

    def __init__(self, optimizer: Optimizer, rho: float) -> None:
        self.optimizer, self.rho = optimizer, rho
        self._weights: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb by the gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        for parameter in parameters:
            self._weights.append((parameter, parameter.clone()))
            parameter.add_(parameter.grad * (self.rho / (norm + 1e-12)))
        if zero_grad:
            self.optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back, and step by the gradients."""
        for parameter, weight in self._weights:
            parameter.copy_(weight)
        self._weights = []
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad()


@dataclass(frozen=True)
class Baseline(Candidate):
    """A training step with an optimizer, in place of the wrapper, that is stepped twice, after a backward pass each."""

    def timed_step(self, batch: Any, device: torch.device) -> StepTimer:
        """One whole training step; the restoration and the base optimizer's step are one phase."""
        timer = StepTimer(device)
        timer.mark('start')
        self.step(batch, timer.mark)
        return timer

    def step(self, batch: Any, mark: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """One whole training step, with marks after its phases; returns what there is to log."""
        loss, log = loss_of(self.model, batch)
        loss.backward()
        mark('pass1')
        self.optim_wrapper.first_step(zero_grad=True)
        mark('perturb')
        loss_of(self.model, batch)[0].backward()
        mark('pass2')
        self.optim_wrapper.second_step(zero_grad=True)
        mark('step')
        return log


def check_baselines(settings: Mapping[str, Any]) -> tuple[list[str], str]:
    """Which baselines can be measured, and a line on what is missing, if anything is.

    Args:
        settings: Config of SAM's optimizer wrapper.

    Raises:
        UsageError: They do not know what the config asks for.
    """
    for key, known in (('dtype', (None, 'bfloat16')), ('clip_grad', (None,)), ('adaptive', (None, False))):
        if settings.get(key) not in known:
            raise UsageError(
                f'--peers: they know no optim_wrapper.{key}={settings[key]!r}: leave --peers out, or set '
                f'--cfg-options optim_wrapper.{key}={known[-1]}'
            )
    if find_spec('pytorch_optimizer') is not None:
        return [*BASELINES], ''
    return [BY_HAND], f'{LIBRARY} is left out: pytorch_optimizer is not installed (pip install pytorch_optimizer)'


def make_baseline(name: str, model: Any, optimizer: Optimizer, rho: float) -> Baseline:
    """A baseline of :data:`BASELINES`, ready to step, from the base optimizer of its model's parameters."""
    if name == BY_HAND:
        return Baseline(name, model, HandWrittenSAM(optimizer, rho))
    # It builds a base optimizer of its own, out of the groups with all their values.
    library = importlib.import_module('pytorch_optimizer')
    return Baseline(name, model, library.SAM(optimizer.param_groups, type(optimizer), rho=rho))
