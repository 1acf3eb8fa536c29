"""Random draws that depend on their place in the training alone (ours).

A generator is made anew for every draw, from the run's seed and the draw's place: which kind of draw, which step, which
rank. So a checkpoint needs nothing but the seed and the step's number to go on with the draws of a run that never
stopped, on every rank, and a step that fails draws the same again.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from mmengine.dist import broadcast_object_list


class Draw(IntEnum):
    """The kinds of draws: each has its own random numbers."""

    MASK = 0
    SAMPLES = 1
    SAMPLES_IN_LOADER = 2
    TIES = 3


def generator_at(seed: int, kind: Draw, *place: int) -> torch.Generator:
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
    seeds = [torch.initial_seed() & (2**63 - 1)]
    broadcast_object_list(seeds)
    return seeds[0]
