"""What one step found, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_NOTHING = nullcontext()
PHASES = ('pass1', 'perturb', 'pass2', 'restore', 'step')
# What the phases above are interrupted by: the losses and draws of single samples, and the wrapper's bookkeeping.
EXCLUDED = ('recording', 'host')


class StepTimer:
    """Marks the ends of a step's phases; on a GPU with events, so that marking never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == 'cuda'
        self._marks: dict[str, Any] = {}
        # By the phase in which each lies: name, begin and end.
        self._excluded: dict[str, list[tuple[str, Any, Any]]] = {}
        self._unassigned: list[tuple[str, Any, Any]] = []
        self._is_open = False

    def mark(self, name: str) -> None:
        """Note that ``name`` ('start' or a member of ``PHASES``) ends now."""
        self._marks[name] = self._now()
        self._excluded[name], self._unassigned = self._unassigned, []

    @contextmanager
    def exclude(self, name: str) -> Iterator[None]:
        """Count the time in this context to ``name`` (a member of ``EXCLUDED``) and not to the phase it lies in.

        Within another such context it does nothing. It must not contain a mark.
        """
        if self._is_open:
            yield
            return
        begin, self._is_open = self._now(), True
        try:
            yield
        finally:
            self._unassigned.append((name, begin, self._now()))
            self._is_open = False

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase and of each excluded part; 0 for a phase that is not marked. Waits for the device.

        A RuntimeError if the step is not over, or was broken off.
        """
        missing = [name for name in ('start', 'step') if name not in self._marks]
        if missing:
            raise RuntimeError(f'the step has no marks {missing}')
        found = dict.fromkeys((*PHASES, *EXCLUDED), 0.0)
        marked = [name for name in ('start', *PHASES) if name in self._marks]
        for start, end in pairwise(marked):
            found[end] = self._between(self._marks[start], self._marks[end])
            for name, begin, finish in self._excluded[end]:
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


class NoTimer(StepTimer):
    """Stands for a timer where the step is not timed."""

    def mark(self, name: str) -> None:
        """Nothing."""

    def exclude(self, name: str) -> AbstractContextManager[None]:  # type: ignore[override]  # no generator: it is faster
        """Nothing."""
        return _NOTHING


NO_TIMER = NoTimer(torch.device('cpu'))


@dataclass(frozen=True)
class PerturbationSizes:
    """How far a step has moved each tensor, kept on the device until somebody asks."""

    parameters: Sequence[nn.Parameter]  # what was perturbed, n of them
    perturbation: Tensor  # ||e_t|| of each, (n,)
    weights: Tensor  # ||w_t|| of each, (n,)
    slope: Tensor  # <e, g>, scalar, without loss scaling: the rise of the loss, were it linear


@dataclass(slots=True)
class StepRecord:
    """What one step found, kept on the device until somebody asks."""

    loss: Tensor  # L(w), scalar; of a step whose only pass is at perturbed weights, L(w + e)
    perturbed_loss: Tensor | None = None  # L(w + e) on the second pass's batch, scalar; None where there was none
    # ||g|| over the perturbed parameters, scalar, without loss scaling; with ASAM and ``adaptive='tensor'`` ||T g||.
    # Where the method changes the gradient before it perturbs along it (Friendly SAM), the norm of what it made of g.
    grad_norm: Tensor | None = None
    timer: StepTimer | None = None  # times of the phases, where timing was asked for
    metrics: Callable[[], dict[str, float]] | None = None  # further scalars for the log, by name; may wait for a device
    sizes: PerturbationSizes | None = None  # how far each tensor was moved, where that was asked for
