"""What one step found, and where its time went (ours)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PHASES = ('pass1', 'climb', 'pass2', 'restore', 'step')


class StepTimer:
    """Marks the ends of a step's phases; on a GPU with events, so that marking never waits for the device.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == 'cuda'
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """Note that ``name`` ('start' or a member of ``PHASES``) ends now."""
        if self._cuda:
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase. Waits for the device.

        Raises:
            RuntimeError: The step is not over, or was broken off.
        """
        missing = [name for name in ('start', *PHASES) if name not in self._marks]
        if missing:
            raise RuntimeError(f'the step has no marks {missing}')
        names = ('start', *PHASES)
        return {end: self._between(start, end) for start, end in pairwise(names)}

    def _between(self, start: str, end: str) -> float:
        if not self._cuda:
            return float(self._marks[end] - self._marks[start])
        self._marks[end].synchronize()
        return float(self._marks[start].elapsed_time(self._marks[end])) / 1e3


@dataclass(frozen=True)
class StepRecord:
    """What one step found, kept on the device until somebody asks.

    Args:
        loss: L(w), scalar.
        perturbed_loss: L(w + e) on the batch of the second pass, scalar.
        grad_norm: ||g|| over the perturbed parameters (ASAM: ||T g||), scalar, without loss scaling.
        timer: Times of the phases, where timing was asked for.
        figures: Computes further scalars for the log, by name; may wait for the device.
    """

    loss: Tensor
    perturbed_loss: Tensor
    grad_norm: Tensor
    timer: StepTimer | None = None
    figures: Callable[[], dict[str, float]] | None = None
