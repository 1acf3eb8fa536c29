"""The forward and backward passes of a method alone: what its own work is measured against.

Theoretical costs take a backward pass for twice a forward pass, half a batch for half of a whole one, and a weight's
gradient that is not computed for a third of its layer's work. Where a machine does not work like that, no code can
bring a step down to them. Here the passes of a method's step are made again: the same inputs, the same gradients left
out, and the base optimizer's step; no perturbation, no losses of samples, nothing kept or checked. What the method's
step takes more than that is the method's own work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mm_sharp.analysis.benchmark.compare import Quartiles, quartiles
from mm_sharp.analysis.benchmark.steps import Candidate

# After a method's name: its passes alone.
SUFFIX = ', passes alone'


class Pass(NamedTuple):
    """A forward pass: its inputs, whether it is differentiated, and which of the parameters are trained in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differentiated: bool
    trained: list[bool]


class PassRecorder:
    """Notes every forward pass of a model in :attr:`passes`."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[Pass] = []
        self._parameters = list(model.parameters())
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trained = [parameter.requires_grad for parameter in self._parameters]
        self.passes.append(Pass(args, kwargs, torch.is_grad_enabled(), trained))


@dataclass(frozen=True, kw_only=True)
class PassesOnly(Candidate):
    """A step of nothing but the passes that a method's step has just made, and the base optimizer's own step."""

    recorder: PassRecorder  # of the method's model

    def step(self, batch: Any) -> dict[str, Any]:
        """One whole step, on the batches of the method's passes; returns what there is to log."""
        log: dict[str, Any] = {}
        for args, kwargs, differentiated, trained in self.recorder.passes:
            for parameter, is_trained in zip(self.model.parameters(), trained, strict=True):
                parameter.requires_grad_(is_trained)
            # An earlier pass's gradients are of no use to this one.
            self.optim_wrapper.zero_grad()
            with torch.set_grad_enabled(differentiated):
                losses = self.model(*args, **kwargs)
            loss, log = self.model.parse_losses(losses)
            if loss.requires_grad:
                loss.backward()
        self.recorder.passes.clear()
        self.optim_wrapper.optimizer.step()
        self.optim_wrapper.zero_grad()
        return dict(log)


def own_work(times: Mapping[str, Sequence[float]]) -> dict[str, Quartiles]:
    """What each method's step takes more than its passes alone in the same round, in base steps, by method."""
    seconds = {name: np.asarray(steps) for name, steps in times.items()}
    methods = [name for name in seconds if name + SUFFIX in seconds]
    return {name: quartiles((seconds[name] - seconds[name + SUFFIX]) / seconds['base']) for name in methods}
