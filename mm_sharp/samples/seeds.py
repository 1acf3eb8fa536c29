"""Random streams that depend on their place in the training alone.

A generator is made anew for every use, from the run's seed and the place: which stream, which rank, which step, and
which of several wrappers. So a checkpoint needs nothing but the seed and two numbers, and a step that fails draws the
same again.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from mmengine.dist import broadcast_object_list


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
    values = [torch.initial_seed() & (2**63 - 1)]
    broadcast_object_list(values)
    return values[0]
