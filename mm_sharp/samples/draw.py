"""One mini-batch's draw: which samples, and how likely each was (AUSAM; Deng et al., AAAI 2025, arXiv 2406.08001).

The wrapper draws from batches that are loaded already, the sampler of the data loader before they are loaded: both by
:class:`BatchDrawer`, so that the probabilities are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mm_sharp.samples.history import Keys, SampleHistory
from mm_sharp.samples.selection import (
    FloatArray,
    IntArray,
    Preference,
    horvitz_thompson_weights,
    inclusion_probabilities,
    normalised_scores,
    sample_count,
    systematic_sample,
)


@dataclass(frozen=True)
class BatchDraw:
    """The samples drawn from a mini-batch of N.

    Args:
        chosen: Their rows in the batch, increasing, (K,).
        pi: Inclusion probability of every sample, (N,), float64.
        scores: Average loss difference of every sample when it was drawn, (N,), float64; NaN where never seen.
    """

    chosen: IntArray
    pi: FloatArray
    scores: FloatArray

    @property
    def size(self) -> int:
        """N."""
        return len(self.pi)

    @property
    def weights(self) -> FloatArray:
        """Horvitz-Thompson weights 1 / (N * pi_i) of the drawn samples, (K,), float64."""
        return horvitz_thompson_weights(self.pi, self.chosen)

    def scalars(self) -> dict[str, float]:
        """Figures for the log.

        Returns:
            ``sampling_entropy``: entropy of the shares pi_i / K over log N, from 0 to 1, where 1 is a uniform draw;
            ``large_scores``: share of the batch's samples whose score is above the middle between the smallest and the
            largest, those never seen among them.
        """
        shares = self.pi / self.pi.sum()
        entropy = -float((shares * np.log(shares)).sum()) / math.log(self.size) if self.size > 1 else 1.0
        return {'sampling_entropy': entropy, 'large_scores': float((normalised_scores(self.scores) > 0.5).mean())}


class BatchDrawer:
    """Draws K = ceil(sampling_ratio * N) samples of each batch by their scores, and at least ``fewest`` if there are.

    Args:
        history: Where the scores come from.
        sampling_ratio: Share of the samples to draw, in (0, 1].
        s_min: Normalised score of the smallest, > 0.
        s_max: Normalised score of the largest, >= ``s_min``.
        preference: Whether large scores or small ones are drawn more often, and where scores are clipped.

    Attributes:
        fewest: The fewest samples that the model can train on: what :func:`mm_sharp.samples.subset.fewest_samples`
        gives.
    """

    def __init__(
        self,
        history: SampleHistory,
        sampling_ratio: float,
        s_min: float,
        s_max: float,
        preference: Preference | None = None,
    ) -> None:
        self.history = history
        self.sampling_ratio = sampling_ratio
        self.s_min = s_min
        self.s_max = s_max
        self.preference = preference or Preference()
        self.fewest = 1

    def draw(self, keys: Keys, generator: torch.Generator) -> BatchDraw:
        """Draw from the batch of ``keys``, N pairs of a data set's name and a sample's id."""
        scores = self.history.scores(keys)
        k = sample_count(self.sampling_ratio, len(keys), self.fewest)
        pi = inclusion_probabilities(scores, k, self.s_min, self.s_max, self.preference)
        return BatchDraw(systematic_sample(pi, generator), pi, scores)
