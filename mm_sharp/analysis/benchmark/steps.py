"""Training steps of several methods side by side, timed in interleaved rounds.

A machine's speed drifts, and other programs take their share of it: in every round each method makes one step, on the
same batch, so that what slows one slows all. The order is rotated from round to round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from mm_sharp.errors import UsageError
from mm_sharp.per_sample_loss import PerSampleLossError
from mm_sharp.samples.keys import SampleIdError
from mm_sharp.step.timing import StepTimer
from mm_sharp.step.wrapper import TwoPassOptimWrapper

T = TypeVar('T')
Phases = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """A method with a model and an optimizer wrapper of its own."""

    name: str
    model: Any
    optim_wrapper: Any

    def step(self, batch: Any) -> dict[str, Any]:
        """One whole training step; returns what there is to log."""
        log: dict[str, Any] = self.model.train_step(batch, self.optim_wrapper)
        return log

    def timed_step(self, batch: Any, device: torch.device) -> StepTimer:
        """One whole training step, with marks at the ends of its phases."""
        wrapper = self.optim_wrapper
        if isinstance(wrapper, TwoPassOptimWrapper):
            wrapper.record_timing = True
            self.step(batch)
            wrapper.record_timing = False
            timed = wrapper.last_step.timer if wrapper.last_step else None
            assert timed is not None
            return timed
        timer = StepTimer(device)
        timer.mark('start')
        with wrapper.optim_context(self.model):
            loss, _ = loss_of(self.model, batch)
        wrapper.backward(wrapper.scale_loss(loss))
        timer.mark('pass1')
        wrapper.step()
        wrapper.zero_grad()
        timer.mark('step')
        return timer


def loss_of(model: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a batch and what there is to log, as MMEngine's ``train_step`` computes them."""
    loss, log = model.parse_losses(model._run_forward(model.data_preprocessor(batch, True), mode='loss'))
    return loss, dict(log)


def step_seconds(candidate: Candidate, batch: Any, device: torch.device) -> float:
    """Time of a whole step."""
    return seconds_of(lambda: candidate.step(batch), device)


def phase_seconds(candidate: Candidate, batch: Any, device: torch.device) -> Phases:
    """Times of a step's phases, by marks between them, which disturb; ``'host'`` is what is in no other phase.

    On a GPU, where the device waits for the host, that is in the phase that it waits in.
    """
    timers: list[StepTimer] = []
    total = seconds_of(lambda: timers.append(candidate.timed_step(batch, device)), device)
    seconds = timers[0].seconds()
    seconds['host'] += max(0.0, total - sum(seconds.values()))
    return seconds


def measure_rounds(
    groups: Sequence[Sequence[Candidate]],
    batches: Sequence[Any],
    rounds: int,
    warmup: int,
    device: torch.device,
    measure: Callable[[Candidate, Any, torch.device], T],
) -> dict[str, list[T]]:
    """Measure steps of all methods, in rounds of one step each.

    Args:
        groups: The methods; those in a group make their steps directly one after the other.
        batches: Taken in turn; the same one for all methods in a round.
        rounds: Measured steps of each method.
        warmup: Steps of each method before; at least 1.
        device: Where they run.
        measure: What is measured of a step: :func:`step_seconds` or :func:`phase_seconds`.

    Raises:
        UsageError: A method does not work with this model, or a loss is not finite, so that steps end early.
    """
    for number in range(warmup):
        for candidate in chain(*groups):
            _check_step(candidate, batches[number % len(batches)])
    found: dict[str, list[T]] = {candidate.name: [] for candidate in chain(*groups)}
    for number in _without_collection(rounds):
        first = number % len(groups)
        for candidate in chain(*groups[first:], *groups[:first]):
            found[candidate.name].append(measure(candidate, batches[(warmup + number) % len(batches)], device))
    return found


def _without_collection(rounds: int) -> Iterator[int]:
    """Count the rounds; Python's garbage collector, which else runs when it likes, runs between them."""
    gc.disable()
    gc.freeze()  # what is there already need not be looked at
    try:
        for number in range(rounds):
            gc.collect()
            yield number
    finally:
        gc.unfreeze()
        gc.enable()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Time of a call, from an idle device to the end of the work that the call left on it."""
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    wait = getattr(torch, device.type).synchronize  # torch.cpu's does nothing
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def _check_step(candidate: Candidate, batch: Any) -> None:
    """Make one step and see whether it can be measured."""
    try:
        log = candidate.step(batch)
    except (PerSampleLossError, SampleIdError) as error:
        raise UsageError(f'{error} (Or leave {candidate.name} out of --methods.)') from error
    loss = float(torch.as_tensor(log['loss']).detach())
    if not math.isfinite(loss):
        raise UsageError(f'{candidate.name}: the loss at the initial weights is {loss}: no whole step can be measured')
