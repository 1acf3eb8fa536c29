"""Random draws that depend on their place in the training alone (ours).

A generator is made anew for every draw, from the run's seed and the draw's place: which kind of draw, which step, which
rank, and which of several wrappers. So a checkpoint needs nothing but the seed and two numbers to go on with the draws
of a run that never stopped, on every rank, and a step that fails draws the same again.
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


class Draw(IntEnum):
    """The kinds of draws: each has its own random numbers."""

    MASK = 0
    SAMPLES = 1
    SAMPLES_IN_LOADER = 2
    TIES = 3


def make_generator(seed: int, kind: Draw, *place: int) -> torch.Generator:
    """A generator on the CPU for one draw.

    Args:
        seed: The run's seed, >= 0.
        kind: What is drawn.
        place: Where in the training, such as the rank and the step's number; each >= 0.
    """
    words = np.random.SeedSequence([seed, int(kind), *place]).generate_state(2)
    generator = torch.Generator()
    generator.manual_seed(int(words[0]) | int(words[1]) << 32)
    return generator


def shared_seed() -> int:
    """A seed that all ranks agree on: rank 0's seed of torch, which MMEngine sets from ``randomness.seed``."""
    return _of_rank_0(torch.initial_seed() & (2**63 - 1))


class Member:
    """Which of the wrappers that are trained side by side a wrapper is, so that each draws independently.

    - In a Runner it is the place in the ``OptimWrapperDict``. The first one draws as a wrapper that is by itself.
    - Elsewhere nobody says which wrappers belong together. Once another one of the same seed has drawn between two of a
      wrapper's own draws, its draws follow from its weights too. So two wrappers whose steps take turns draw alike in
      the first step, and afterwards only if all their weights are alike.

    Trainings that follow each other in one process are each by themselves. The number is the same on all ranks, and a
    checkpoint holds it.

    Args:
        weights: Gives the weights that the wrapper trains.

    Attributes:
        number: 0 for a wrapper that is by itself or the first; None as long as nobody has said so.
    """

    _drawn: ClassVar[Counter[int]] = Counter()  # by seed: the draws of all wrappers of this process

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self.number: int | None = None
        self._weights = weights
        self._last: int | None = None  # the number of the own last draw

    def place(self, seed: int) -> tuple[int, ...]:
        """What the place of a draw with ``seed``, which is made now, has in addition."""
        if self.number is None and self._was_interrupted(seed):
            self.number = _of_rank_0(_fingerprint(self._weights()))
        self._drawn[seed] += 1
        self._last = self._drawn[seed]
        return (self.number,) if self.number else ()

    def state(self, seed: int | None) -> dict[str, int | bool | None]:
        """For a checkpoint; plain types."""
        return {'number': self.number, 'interrupted': self.number is None and self._was_interrupted(seed)}

    def load(self, state: Mapping[str, Any], seed: int | None) -> None:
        """Go on from what :meth:`state` gave; from nothing, as a wrapper by itself."""
        self.number = state.get('number')
        self._last = None if seed is None else -1 if state.get('interrupted') else self._drawn[seed]

    def _was_interrupted(self, seed: int | None) -> bool:
        return seed is not None and self._last is not None and self._last != self._drawn[seed]


def _fingerprint(weights: Iterable[Tensor]) -> int:
    """A number of 63 bits, the largest one set, that other weights do not have: of signs, which no rounding changes."""
    signs = [(local_shard(w.detach()).reshape(-1)[:8] > 0).cpu() for w in weights if not is_lazy(w)]
    digest = blake2b(bytes(flag for sign in signs for flag in sign.tolist()), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 2 | 1 << 62


def _of_rank_0(value: int) -> int:
    values = [value]
    broadcast_object_list(values)
    return values[0]
