"""SAM as it is written without this package: by hand around the training step, and by another package (ours).

Both run on the same model, batch, optimizer and precision as the methods here. What they leave out: the second pass
moves BatchNorm's statistics a second time, dropout draws other masks in it, and neither asks whether values are finite.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.analysis.benchmark.autocast import autocast_to
from mm_sharp.analysis.benchmark.steps import Candidate
from mm_sharp.errors import UsageError
from mm_sharp.ops.parameters import parameters_of
from mm_sharp.step.timing import StepTimer

BY_HAND, LIBRARY = 'sam by hand', 'pytorch_optimizer.SAM'
PEERS = (BY_HAND, LIBRARY)
_MODULE = 'pytorch_optimizer'


class TwoSteps(Protocol):
    """An optimizer that is stepped twice, with a backward pass before each."""

    def first_step(self, zero_grad: bool = False) -> Any:
        """Climb by the gradients."""

    def second_step(self, zero_grad: bool = False) -> Any:
        """Go back, and step by the gradients."""


class HandWrittenSAM:
    """SAM as many write it: a loop over the parameters, and a clone of each, made anew in every step.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation.
    """

    def __init__(self, optimizer: Optimizer, rho: float) -> None:
        self.optimizer, self.rho = optimizer, rho
        self._weights: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb by the gradients."""
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
class Peer(Candidate):
    """A training step with an optimizer that is stepped twice.

    Args:
        sam: The optimizer.
        autocast: Makes the context of a forward pass.
    """

    sam: TwoSteps
    autocast: Callable[[], AbstractContextManager[Any]]

    def step(self, batch: Any) -> dict[str, Any]:
        """One whole training step; returns what there is to log."""
        return self._step(batch, None)

    def timed_step(self, batch: Any, device: torch.device) -> StepTimer:
        """One whole training step with marks; the climb back and the base optimizer's step are one phase."""
        timer = StepTimer(device)
        timer.mark('start')
        self._step(batch, timer)
        return timer

    def _step(self, batch: Any, timer: StepTimer | None) -> dict[str, Any]:
        mark: Callable[[str], None] = (lambda _: None) if timer is None else timer.mark
        log = self._forward_and_backward(batch)
        mark('pass1')
        self.sam.first_step(zero_grad=True)
        mark('climb')
        self._forward_and_backward(batch)
        mark('pass2')
        self.sam.second_step(zero_grad=True)
        mark('step')
        return log

    def _forward_and_backward(self, batch: Any) -> dict[str, Any]:
        with self.autocast():
            data = self.model.data_preprocessor(batch, True)
            losses = self.model._run_forward(data, mode='loss')
        loss, log = self.model.parse_losses(losses)
        loss.backward()
        return dict(log)


def check_peers(settings: Mapping[str, Any], peers: tuple[str, ...] = PEERS) -> tuple[list[str], str | None]:
    """Which peers can be measured.

    Args:
        settings: Of the optimizer wrapper of SAM; see :func:`mm_sharp.analysis.benchmark.methods.wrapper_settings`.
        peers: Those that are wanted.

    Returns:
        Their names, and a line on what is missing, if anything is.

    Raises:
        UsageError: They do not know what the config asks for.
    """
    for key, known in (('dtype', (None, 'bfloat16')), ('clip_grad', (None,)), ('adaptive', (None, False))):
        if settings.get(key) not in known:
            raise UsageError(
                f'--peers: they know no optim_wrapper.{key}={settings[key]!r}: leave --peers out, or set '
                f'--cfg-options optim_wrapper.{key}={known[-1]}'
            )
    if LIBRARY not in peers or importlib.util.find_spec(_MODULE) is not None:
        return list(peers), None
    missing = f'{LIBRARY} is left out: pytorch_optimizer is not installed (pip install pytorch_optimizer)'
    return [name for name in peers if name != LIBRARY], missing


def make_peer(name: str, model: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]) -> Peer:
    """A peer, ready to step.

    Args:
        name: Of :data:`PEERS`.
        model: Its own.
        optimizer: Base optimizer of ``model``'s parameters.
        settings: Of SAM's optimizer wrapper: its ``rho`` and ``dtype``.
    """
    rho = settings.get('rho', 0.05)
    if name == BY_HAND:
        sam: TwoSteps = HandWrittenSAM(optimizer, rho)
    else:
        # It builds a base optimizer of its own, out of the groups with all their values.
        sam = importlib.import_module(_MODULE).SAM(optimizer.param_groups, type(optimizer), rho=rho)
    autocast = autocast_to(settings.get('dtype'), parameters_of(optimizer)[0].device)
    return Peer(name, model, None, sam, autocast)
