"""Where the time of a step goes (ours).

=============  ================================================================================================
``pass1``      first forward and backward pass
``climb``      copy of the weights, gradient norm, perturbation
``pass2``      second forward and backward pass; ESAM's forward for the selection too
``restore``    weights, buffers, counters and random state back
``step``       clipping, the base optimizer's step, and the gradients' end
``recording``  losses of single samples, draw, selection and history
``host``       everything else: the state that is kept, checks of arguments and values, MMEngine's own work
=============  ================================================================================================

On a GPU these are times of the device's stream: where it waits for the host, that is in the phase that it waits in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mm_sharp.analysis.benchmark.compare import columns
from mm_sharp.analysis.benchmark.methods import StepLimit
from mm_sharp.analysis.benchmark.steps import Candidate, collection_between_rounds, seconds_of
from mm_sharp.step.timing import EXCLUDED, PHASES, StepTimer

NAMES = (*PHASES, *EXCLUDED)
Phases = dict[str, float]


def measure_phases(
    candidates: Sequence[Candidate], batches: Sequence[Any], rounds: int, done: int, device: torch.device
) -> dict[str, list[Phases]]:
    """Steps with marks in between, which disturb: not those that give the step times.

    Args:
        candidates: The methods.
        batches: Taken in turn.
        rounds: Steps of each method, interleaved.
        done: Steps that each method had made before.
        device: Where they run.

    Returns:
        Seconds of each phase of each step, by method.
    """
    found: dict[str, list[Phases]] = {candidate.name: [] for candidate in candidates}
    with collection_between_rounds() as collect:
        for number in range(rounds):
            collect()
            for candidate in candidates:
                found[candidate.name].append(_phases(candidate, batches[(done + number) % len(batches)], device))
    return found


def _phases(candidate: Candidate, batch: Any, device: torch.device) -> Phases:
    timers: list[StepTimer] = []
    total = seconds_of(lambda: timers.append(candidate.timed_step(batch, device)), device)
    seconds = timers[0].seconds()
    # What lies before the first mark and after the last.
    seconds['host'] += max(0.0, total - sum(seconds.values()))
    return seconds


def typical(
    found: Mapping[str, Sequence[Phases]], limits: Mapping[str, StepLimit | None], done: int
) -> dict[str, Phases]:
    """The median of each phase's seconds, by method; of a method with costlier steps at intervals, of the others.

    Args:
        found: Of :func:`measure_phases`.
        limits: By method; None for one of which arithmetic says nothing.
        done: Steps that each method had made before: of a cycle, the first step is the costlier one.
    """
    return {name: _medians(steps, limits[name], done) for name, steps in found.items()}


def _medians(steps: Sequence[Phases], limit: StepLimit | None, done: int) -> Phases:
    costlier = [False] * len(steps) if limit is None else limit.costlier(len(steps), done)
    common = [step for step, costs_more in zip(steps, costlier, strict=True) if not costs_more]
    return {phase: float(np.median([step[phase] for step in common or steps])) for phase in NAMES}


def phase_table(phases: Mapping[str, Phases]) -> str:
    """Each phase's share of its method's step, as text."""
    lines = [['share of a step, %', *NAMES]]
    for name, seconds in phases.items():
        total = sum(seconds.values())
        lines.append([name, *(f'{100 * seconds[phase] / total:.1f}' for phase in NAMES)])
    return columns(lines)
