"""Training steps of several methods side by side, timed in interleaved rounds (ours).

A machine's speed drifts, and other programs take their share of it: in every round each method makes one step, on the
same batch, so that what slows one slows all. The order is rotated from round to round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mm_sharp.errors import UsageError
from mm_sharp.per_sample_loss import PerSampleLossError
from mm_sharp.samples.keys import SampleIdError
from mm_sharp.step.timing import StepTimer
from mm_sharp.step.wrapper import TwoPassOptimWrapper


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
        if not isinstance(wrapper, TwoPassOptimWrapper):
            return self._timed_plain_step(batch, device)
        wrapper.record_timing = True
        try:
            self.step(batch)
        finally:
            wrapper.record_timing = False
        record = wrapper.last_step
        assert record is not None
        assert record.timer is not None
        return record.timer

    def _timed_plain_step(self, batch: Any, device: torch.device) -> StepTimer:
        """The same with a wrapper of MMEngine's: one pass, and the optimizer's step."""
        wrapper, timer = self.optim_wrapper, StepTimer(device)
        backward = wrapper.backward

        def marked(loss: Any, **kwargs: Any) -> None:
            backward(loss, **kwargs)
            timer.mark('pass1')

        wrapper.backward = marked  # hides the method, until it is deleted
        try:
            timer.mark('start')
            self.step(batch)
            timer.mark('step')
        finally:
            del wrapper.backward
        return timer


def measure_rounds(
    candidates: Sequence[Candidate], batches: Sequence[Any], rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the steps.

    Args:
        candidates: The methods, at least one.
        batches: Taken in turn; the same one for all methods in a round.
        rounds: Timed steps of each method.
        warmup: Steps of each method before, not timed; at least 1.
        device: Where they run.

    Returns:
        Seconds of the timed steps of each method, by name, in their order.

    Raises:
        UsageError: A method does not work with this model, or a loss is not finite, so that steps end early.
    """
    for number in range(warmup):
        for candidate in candidates:
            _check_step(candidate, batches[number % len(batches)])
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    with collection_between_rounds() as collect:
        for number in range(rounds):
            batch = batches[(warmup + number) % len(batches)]
            first = number % len(candidates)
            collect()
            for candidate in (*candidates[first:], *candidates[:first]):
                times[candidate.name].append(seconds_of(partial(candidate.step, batch), device))
    return times


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
    # Other accelerators have a module of torch with the same function.
    wait = (lambda: None) if device.type == 'cpu' else getattr(torch, device.type).synchronize
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


@contextmanager
def collection_between_rounds() -> Iterator[Callable[[], object]]:
    """Keep Python's garbage collector, which runs when it likes, out of the times; gives the function that runs it."""
    enabled = gc.isenabled()
    gc.disable()
    # What is there already stays: a collection need not look at it.
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _check_step(candidate: Candidate, batch: Any) -> None:
    """Make one step and see whether it can be measured."""
    try:
        log = candidate.step(batch)
    except (PerSampleLossError, SampleIdError) as error:
        raise UsageError(f'{error} (Or leave {candidate.name} out of --methods.)') from error
    loss = float(torch.as_tensor(log.get('loss', 0.0)).detach())
    if not math.isfinite(loss):
        raise UsageError(f'{candidate.name}: the loss at the initial weights is {loss}: no whole step can be measured')
