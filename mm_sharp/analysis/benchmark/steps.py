"""Training steps of several methods side by side, timed in interleaved rounds.

A machine's speed drifts, and other programs take their share of it: in every round each method makes one step, on the
same batch, so that what slows one slows all. The order is rotated from round to round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any, TypeVar

import torch

from mm_sharp.analysis.benchmark.candidates import Candidate
from mm_sharp.errors import UsageError
from mm_sharp.per_sample_loss import PerSampleLossError
from mm_sharp.samples.keys import SampleIdError
from mm_sharp.step.timing import StepTimer

T = TypeVar('T')
Phases = dict[str, float]


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
        rounds: Measured steps of each method, after ``warmup`` others, at least 1.
        measure: What is measured of a step: :func:`step_seconds` or :func:`phase_seconds`.

    Raises:
        UsageError: A method does not work with this model, or a loss is not finite, so that steps end early.
    """
    for number, candidate in product(range(warmup), chain(*groups)):
        _check_step(candidate, batches[number % len(batches)])
    found: dict[str, list[T]] = {candidate.name: [] for candidate in chain(*groups)}
    # Python's garbage collector, which else runs when it likes, runs between the rounds.
    gc.disable()
    gc.freeze()  # what is there already need not be looked at
    try:
        for number in range(rounds):
            gc.collect()
            first = number % len(groups)
            for candidate in chain(*groups[first:], *groups[:first]):
                found[candidate.name].append(measure(candidate, batches[(warmup + number) % len(batches)], device))
    finally:
        gc.unfreeze()
        gc.enable()
    return found


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
    try:
        log = candidate.step(batch)
    except (PerSampleLossError, SampleIdError) as error:
        raise UsageError(f'{error} (Or leave {candidate.name} out of --methods.)') from error
    loss = float(torch.as_tensor(log['loss']).detach())
    if not math.isfinite(loss):
        raise UsageError(f'{candidate.name}: the loss at the initial weights is {loss}: no whole step can be measured')
