"""What one step found, and where its time went (ours)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PHASES = ('pass1', 'climb', 'pass2', 'restore', 'step')
# What the phases above are interrupted by: the losses and draws of single samples, and the wrapper's bookkeeping.
ASIDES = ('recording', 'host')


class StepTimer:
    """Marks the ends of a step's phases; on a GPU with events, so that marking never waits for the device.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == 'cuda'
        self._marks: dict[str, Any] = {}
        # By the phase in which each lies: name, begin and end.
        self._asides: dict[str, list[tuple[str, Any, Any]]] = {}
        self._unassigned: list[tuple[str, Any, Any]] = []
        self._aside_is_open = False

    def mark(self, name: str) -> None:
        """Note that ``name`` ('start' or a member of ``PHASES``) ends now."""
        self._marks[name] = self._now()
        self._asides[name], self._unassigned = self._unassigned, []

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Count the time in this context to ``name`` (a member of ``ASIDES``) and not to the phase it lies in.

        Within another such context it does nothing. It must not contain a mark.
        """
        if self._aside_is_open:
            yield
            return
        begin, self._aside_is_open = self._now(), True
        try:
            yield
        finally:
            self._unassigned.append((name, begin, self._now()))
            self._aside_is_open = False

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase and of each aside; 0 for a phase that is not marked. Waits for the device.

        Raises:
            RuntimeError: The step is not over, or was broken off.
        """
        missing = [name for name in ('start', 'step') if name not in self._marks]
        if missing:
            raise RuntimeError(f'the step has no marks {missing}')
        found = dict.fromkeys((*PHASES, *ASIDES), 0.0)
        marked = [name for name in ('start', *PHASES) if name in self._marks]
        for start, end in pairwise(marked):
            found[end] = self._between(self._marks[start], self._marks[end])
            for name, begin, finish in self._asides[end]:
                inside = self._between(begin, finish)
                found[name] += inside
                found[end] -= inside
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


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
