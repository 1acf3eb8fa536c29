"""Random streams that depend on their place in the training alone.

A generator is made anew for every use, from the run's seed and the place: which stream, which rank, which step, and
which of several wrappers. So a checkpoint needs nothing but the seed and two numbers, and a step that fails draws the
same again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.dist import broadcast_object_list
from torch import Tensor
from torch.nn.parameter import is_lazy

from mm_sharp.ops.fsdp import local_shard


class RngStream(IntEnum):
    """What random numbers are used for: each use has its own."""

    MASK = 0
    SAMPLES = 1
    SAMPLES_IN_LOADER = 2
    TIES = 3


def make_generator(seed: int, stream: RngStream, *place: int) -> torch.Generator:
    """A generator on the CPU for one use, at a place such as (rank, step); all numbers are >= 0."""
    # The words that SeedSequence itself makes of a list of integers, in twice the time.
    words = [word for number in (seed, stream, *place) for word in _words(number)]
    low, high = np.random.SeedSequence(np.array(words, np.uint32)).generate_state(2).tolist()
    generator = torch.Generator()
    generator.manual_seed(low | high << 32)
    return generator


def _words(number: int) -> list[int]:
    return [number] if number < 1 << 32 else [number & 0xFFFFFFFF, *_words(number >> 32)]


def shared_seed() -> int:
    """A seed that all ranks agree on: rank 0's seed of torch, which MMEngine sets from ``randomness.seed``."""
    return _from_rank_0(torch.initial_seed() & (2**63 - 1))


class Member:
    """Which of several wrappers that are trained side by side a wrapper is, so that each draws independently.

    In a Runner, ``number`` is the wrapper's place in the ``OptimWrapperDict``; 0 draws as a single wrapper does.

    Elsewhere nobody says which wrappers belong together, and it is None. Once another wrapper of the same seed has
    drawn between two of a wrapper's own draws, it is made of its ``weights``. So two wrappers whose steps take turns
    draw alike in the first step, and afterwards only if all their weights are alike; trainings that follow each other
    do not change each other. It is the same on all ranks, and a checkpoint holds it.
    """

    _drawn: ClassVar[Counter[int]] = Counter()  # by seed: the draws of all wrappers of this process

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self.number: int | None = None
        self._weights = weights
        self._last: int | None = None  # the number of the own last draw

    def place(self, seed: int) -> tuple[int, ...]:
        """What a draw that is made now adds to its place; counts the draw."""
        if self.number is None and self._was_interrupted(seed):
            self.number = _from_rank_0(_fingerprint(self._weights()))
        self._drawn[seed] += 1
        self._last = self._drawn[seed]
        return (self.number,) if self.number else ()

    def state(self, seed: int | None) -> dict[str, int | bool | None]:
        """For a checkpoint; plain types."""
        return {'number': self.number, 'interrupted': self.number is None and self._was_interrupted(seed)}

    def load(self, state: Mapping[str, Any], seed: int | None) -> None:
        """Continue from what :meth:`state` gave; from ``{}`` as a single wrapper."""
        self.number = state.get('number')
        self._last = None if seed is None else -1 if state.get('interrupted') else self._drawn[seed]

    def _was_interrupted(self, seed: int | None) -> bool:
        return seed is not None and self._last is not None and self._last != self._drawn[seed]


def _fingerprint(weights: Iterable[Tensor]) -> int:
    """A number of 63 bits, the largest one set, made of the weights' signs, which no rounding changes."""
    signs = [(local_shard(w.detach()).reshape(-1)[:8] > 0).cpu() for w in weights if not is_lazy(w)]
    digest = blake2b(bytes(flag for sign in signs for flag in sign.tolist()), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 2 | 1 << 62


def _from_rank_0(value: int) -> int:
    values = [value]
    broadcast_object_list(values)
    return values[0]
