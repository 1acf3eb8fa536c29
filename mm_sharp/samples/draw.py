"""One mini-batch's draw: which samples, and how likely each was (AUSAM; Deng et al., AAAI 2025, arXiv 2406.08001).

The wrapper draws from batches that are loaded already, the sampler of the data loader before they are loaded: both by
:class:`BatchDrawer`, so that the probabilities are the same. The sampler's draws wait in a :class:`DrawQueue` until
their batches arrive: workers load ahead, so several are in flight at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import eq
from typing import Any

import numpy as np
import torch

from mm_sharp.samples.history import Keys, SampleHistory
from mm_sharp.samples.schedule import AFTER_RAMP, Schedule, TrainingLength, TrainingPlace
from mm_sharp.samples.selection import (
    LARGE,
    FloatArray,
    IntArray,
    Preference,
    batch_figures,
    draw_sizes,
    horvitz_thompson_weights,
    inclusion_probabilities,
    sample_count,
    sequential_sample,
    systematic_sample,
    uniform_sample,
)

# Far more than workers load ahead: it bounds what piles up where batches are loaded that nobody takes.
_MOST_IN_FLIGHT = 1024
# So many batches in a row without one expected sample are no chance: the keys are wrong.
_MOST_WITHOUT_A_MATCH = 8


@dataclass(frozen=True)
class BatchDraw:
    """The samples drawn from a mini-batch of N."""

    chosen: IntArray  # their rows in the batch, increasing, (K,)
    # Inclusion probability of every sample, (N,), float64. Of a sequential draw, which has no formula for it, K times
    # the probability to be drawn first, for the log alone.
    pi: FloatArray
    # Average loss difference of every sample when it was drawn, (N,), float64; NaN where never seen, and in a uniform
    # draw.
    scores: FloatArray

    @property
    def size(self) -> int:
        """N."""
        return len(self.pi)

    @property
    def counts(self) -> tuple[int, int]:
        """K and N."""
        return len(self.chosen), self.size

    @property
    def weights(self) -> FloatArray:
        """Horvitz-Thompson weights 1 / (N * pi_i) of the drawn samples, (K,), float64."""
        return horvitz_thompson_weights(self.pi, self.chosen)

    def scalars(self) -> dict[str, float]:
        """Figures for the log."""
        return batch_figures(self.pi, self.scores)


@dataclass
class BatchDrawer:
    """Draws K = ceil(sampling_ratio * N) samples of each batch by their scores in ``history``.

    K is at least ``fewest``: what :func:`mm_sharp.samples.subset.fewest_samples` says of the model.
    """

    history: SampleHistory
    schedule: Schedule
    preference: Preference = LARGE
    fewest: int = 1

    def draw(self, keys: Keys, generator: torch.Generator, place: TrainingPlace = AFTER_RAMP) -> BatchDraw:
        """Draw from the batch of ``keys``, N pairs of a data set's name and a sample's id, in a step at ``place``.

        A uniform draw does not look at the keys.
        """
        size, k = len(keys), self._count(len(keys), place)
        if self.schedule.draw == 'uniform':
            return BatchDraw(uniform_sample(size, k, generator), np.full(size, k / size), np.full(size, math.nan))
        scores, s_min, s_max = self.history.scores(keys), self.schedule.s_min, self.schedule.s_max_at(place)
        if self.schedule.draw == 'systematic' or k == size:
            pi = inclusion_probabilities(scores, k, s_min, s_max, self.preference)
            return BatchDraw(systematic_sample(pi, generator), pi, scores)
        sizes = draw_sizes(scores, s_min, s_max, self.preference)
        return BatchDraw(sequential_sample(sizes, k, generator), k * sizes / sizes.sum(), scores)

    def _count(self, size: int, place: TrainingPlace) -> int:
        return sample_count(self.schedule.ratio_at(place), size, self.fewest)

    def in_words(self, batch_size: int, length: TrainingLength) -> str:
        """What is drawn in a training of this length, for the log."""
        plan, by_epochs = self.schedule, length.epoch_length is not None
        count = sample_count(plan.sampling_ratio, batch_size, self.fewest)
        parts = [f'{count} of {batch_size} in both passes']
        if count == batch_size:
            return (
                f"{parts[0]}, as with SAM and at SAM's cost: a larger batch or a smaller sampling_ratio leaves some out"
            )
        if plan.whole_first_epoch:
            parts.append('all in the first epoch' if by_epochs else 'no whole first epoch: the data set has no length')
        if plan.draw == 'uniform':
            return '; '.join([*parts, 'drawn uniformly'])
        which = 'smaller' if self.preference.small else 'larger'
        parts.append(f'the {which} the loss difference, the likelier ({plan.draw} draw)')
        over = f'{plan.ramp * length.epochs:g} {"epochs" if by_epochs else "iterations"}'
        rising = f's_max {plan.s_min:g} to {plan.s_max:g} over the first {over}'
        rises = plan.ramp > 0 and not (by_epochs and plan.ramp * length.epochs <= 1)  # it rises from epoch to epoch
        parts.append(rising if rises else f's from {plan.s_min:g} to {plan.s_max:g}')
        return '; '.join(parts)


@dataclass(frozen=True)
class LoaderDraw:
    """One mini-batch's draw, its place in the training, and the keys of the K samples in the order of loading."""

    epoch: int
    position: int
    draw: BatchDraw
    keys: list[tuple[str, int]]

    def fits(self, keys: Keys) -> bool:
        """Whether it is a draw from the mini-batch of these N keys."""
        return self.draw.size == len(keys) and self.keys == [keys[row] for row in self.draw.chosen]

    def agreement(self, received: Keys) -> int:
        """How many of the keys are equal, row by row; -1 if there are not as many."""
        return sum(map(eq, self.keys, received)) if len(self.keys) == len(received) else -1

    def state_dict(self) -> dict[str, Any]:
        """The same in plain types and tensors."""
        tensors = {name: torch.tensor(array) for name, array in vars(self.draw).items()}
        return {'epoch': self.epoch, 'position': self.position, 'keys': list(self.keys), **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LoaderDraw:
        """What :meth:`state_dict` was given for."""
        chosen, pi, scores = (np.array(state[name]) for name in ('chosen', 'pi', 'scores'))
        keys = [(str(name), int(number)) for name, number in state['keys']]
        return cls(state['epoch'], state['position'], BatchDraw(chosen, pi, scores), keys)


class DrawQueue:
    """First in, first out, for draws whose batches may lose samples or get lost on the way."""

    def __init__(self) -> None:
        self._draws: deque[LoaderDraw] = deque()
        self._last: LoaderDraw | None = None
        self._without_a_match = 0

    def __iter__(self) -> Iterator[LoaderDraw]:
        return iter(self._draws)

    def begin(self) -> Callable[[LoaderDraw], None]:
        """Forget the draws of an earlier iteration, and return what appends a draw of the new one."""
        # An earlier iteration that still runs appends to a queue that nobody reads.
        self._draws, self._last = deque(maxlen=_MOST_IN_FLIGHT), None
        return self._draws.append

    def take(self, keys: Keys) -> BatchDraw:
        """The draw of the batch that arrived with these K keys; earlier ones, of skipped batches, are forgotten.

        A data set may replace a sample that it cannot read by another one. So the batch's draw is the one that most of
        its keys agree with (the earliest of several), and if no key agrees with any, the first. A RuntimeError if there
        is no such draw of K samples, or the keys of many batches in a row agree with none.
        """
        received = list(keys)
        if self._last is not None and self._last.keys == received and all(d.keys != received for d in self._draws):
            return self._last.draw  # a step that failed is tried again
        agreement = [draw.agreement(received) for draw in self._draws]
        best = max(agreement, default=-1)
        if best < 0 or (best == 0 and agreement[0] < 0):
            expected = len(self._draws[0].keys) if self._draws else 'none'
            raise RuntimeError(
                f'AUSAMSampler: a batch of {len(received)} samples arrived where {expected} were drawn. Batches must '
                'come from the training data loader, each once and in its order (in_order=True), and no collate '
                'function or data preprocessor may add or leave out samples'
            )
        self._without_a_match = 0 if best > 0 else self._without_a_match + 1
        if self._without_a_match > _MOST_WITHOUT_A_MATCH:
            raise RuntimeError(
                f'AUSAMSampler: not one sample of the last {self._without_a_match} batches is one that was drawn; it '
                f'expected {self._draws[0].keys[0]!r} and got {received[0]!r}. The data set gives its samples other '
                "keys (data set's name, id) when they are loaded than when they are looked up"
            )
        for _ in range(agreement.index(best)):
            self._draws.popleft()
        self._last = self._draws.popleft()
        return self._last.draw
