"""Which samples of a mini-batch take part, as pure functions.

ESAM (Du et al. 2022, arXiv 2110.03141) differentiates, in its second pass, the ceil(gamma * N) samples whose loss the
perturbation raises most (:func:`top_k`).

AUSAM (Deng et al., AAAI 2025, arXiv 2406.08001) draws samples by their scores, normalised within the mini-batch
(:func:`draw_sizes`; :mod:`mm_sharp.methods.ausam` has the equations). Its authors' code draws one after the other
(:func:`sequential_sample`), each time with probabilities proportional to s among those that are left. A sample's
probability to be among the K is then no simple function of s, and it differs less from the others' than s does: at
K = N / 2 and s from 0.1 to 0.5, about 3.3 times, not 5. Ours is :func:`systematic_sample` in random order, which draws
exactly K samples with exactly these probabilities (:func:`inclusion_probabilities`)::

    pi_i = K * s_i / sum(s),  capped at 1 and the excess redistributed

Ours as well: K = ceil(sampling_ratio * N), where the authors' code rounds down, and so has no sample of a batch of one;
samples never seen take ``s_max``; equal scores give equal probabilities, where theirs divides 0 by 0.

Draws run on the host in numpy's float64: some thousand scores are too few for a device. :func:`top_k` stays on the
device on which loss differences are computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Preference(NamedTuple):
    """How scores become ``z`` in [0, 1]; the default is the authors'."""

    small: bool = False  # small scores are drawn more often, and not large ones
    quantile: float = 1.0  # scores above this quantile of the seen ones in the mini-batch, in (0, 1], count as equal


LARGE = Preference()


def sample_count(ratio: float, total: int, fewest: int = 1) -> int:
    """``ceil(ratio * total)``, and at least ``fewest`` where there are as many."""
    # Rounded before: 7 % of 100 samples are 7 samples, though 0.07 * 100 > 7 in floating point.
    return min(total, max(fewest, math.ceil(round(ratio * total, 9))))


def top_k(increases: Tensor, k: int) -> Tensor:
    """The ``k`` samples with the largest loss increase (ESAM), as increasing indices, (k,), without synchronisation.

    ``increases`` are ``l_i(w + e) - l_i(w)``, (N,). Of equal ones the earlier sample goes first; NaN counts as -inf.
    The authors' code compares with a strict ``>`` against the k-th value and so loses a sample; this does not.
    """
    # 0 - x and not -x, so that both zeros are the same key to a radix sort.
    keys = torch.where(increases.isnan(), math.inf, 0.0 - increases.detach())
    return keys.sort(stable=True).indices[:k].sort().values


def inclusion_probabilities(
    scores: npt.ArrayLike, k: int, s_min: float = 0.3, s_max: float = 1.0, preference: Preference = LARGE
) -> FloatArray:
    """The probability of each sample to be among the ``k`` that are drawn (AUSAM).

    ``s_max / s_min`` bounds how much likelier one sample is than another; a cap only brings them closer.

    Args:
        scores: Average loss difference of each sample, shape (N,), finite as float32; NaN where never seen.
        k: Number of samples to draw, 1 to N.
        s_min: Normalised score of the smallest, > 0.
        s_max: Normalised score of the largest and of the unseen, >= ``s_min``.
        preference: With ``small``, ``s_min`` is the largest's, and ``s_max`` the smallest's.

    Returns:
        ``pi``, shape (N,), float64, in (0, 1]; its sum is ``k`` up to the rounding of the sum.
    """
    sizes = draw_sizes(scores, s_min, s_max, preference)
    increasing = np.sort(sizes)
    sums = np.add.accumulate(increasing)
    # left[i]: how many are drawn of the samples 0 to i if all larger ones are certain. The largest i whose share
    # left * size / sum is within 1 is the last one without a cap; there is one, for left[0] <= 1.
    left = np.arange(k - len(sizes) + 1, k + 1)
    last = (left * increasing <= sums).nonzero()[0][-1]
    pi: FloatArray = np.minimum(1.0, left[last] * sizes / sums[last])
    return pi


def draw_sizes(scores: npt.ArrayLike, s_min: float, s_max: float, preference: Preference = LARGE) -> FloatArray:
    """``s_i`` in parts of the largest that there can be, ``s_max``: (N,), float64, in (0, 1].

    The arguments are :func:`inclusion_probabilities`'.
    """
    z = normalised_scores(np.asarray(scores, dtype=np.float64), preference)
    s_min = max(s_min, 1e-200 * s_max)  # keeps the sum of sizes from vanishing
    sizes: FloatArray = (s_min + (s_max - s_min) * z) / (s_min + (s_max - s_min))
    return sizes


def normalised_scores(scores: FloatArray, preference: Preference = LARGE) -> FloatArray:
    """``z`` in [0, 1], (N,): 0 for the smallest score, 1 for the largest, the unseen (NaN), and where all are equal.

    With ``preference.small``, 1 is for the smallest and 0 for the largest.
    """
    unseen = np.isnan(scores)
    low, high = np.fmin.reduce(scores), np.fmax.reduce(scores)  # of the seen ones; NaN if there is none
    if preference.quantile < 1.0 and low < high:
        high = np.quantile(scores[~unseen], preference.quantile)
        scores = np.minimum(scores, high)
    if not low < high:
        return np.ones_like(scores)
    z: FloatArray = (scores - low) / (high - low)
    if preference.small:
        z = 1.0 - z
    z[unseen] = 1.0
    return z


def batch_figures(sizes: FloatArray, scores: FloatArray) -> dict[str, float]:
    """Figures for the log of a mini-batch: :class:`mm_sharp.hooks.SharpnessHook` has them.

    The entropy is that of each sample's share of ``sizes``, (N,): 1 where all are alike. ``scores``, (N,), are NaN
    where never seen, which counts as large.
    """
    total, count = sizes.sum(), len(sizes)
    # 0 * log 0 counts as 0.
    shares = sizes[sizes > 0] / total if total > 0 else np.full(count, 1 / count)
    entropy = -float((shares * np.log(shares)).sum()) / math.log(count) if count > 1 else 1.0
    return {'sampling_entropy': entropy, 'large_scores': float((normalised_scores(scores) > 0.5).mean())}


def sequential_sample(sizes: FloatArray, k: int, generator: torch.Generator) -> IntArray:
    """Draw ``k`` samples one after the other, with probabilities proportional to ``sizes``, (N,), among those left.

    The code of AUSAM's authors calls ``torch.multinomial``, too. Increasing indices, (k,).
    """
    return np.sort(torch.multinomial(torch.from_numpy(sizes), k, generator=generator).numpy())


def uniform_sample(total: int, k: int, generator: torch.Generator) -> IntArray:
    """Draw ``k`` of ``total`` samples, all sets of them equally likely: increasing indices, (k,)."""
    return np.sort(torch.randperm(total, generator=generator)[:k].numpy())


def systematic_sample(pi: npt.ArrayLike, generator: torch.Generator) -> IntArray:
    """Draw ``sum(pi)`` distinct samples, sample i with probability ``pi[i]``: :func:`systematic_choice` at random."""
    probabilities = np.asarray(pi, dtype=np.float64)
    order = torch.randperm(len(probabilities), generator=generator).numpy()
    start = torch.rand((), dtype=torch.float64, generator=generator).item()
    return systematic_choice(probabilities, order, start)


def systematic_choice(pi: FloatArray, order: npt.ArrayLike, start: float) -> IntArray:
    """The samples that systematic sampling takes, given its random numbers.

    The probabilities ``pi``, (N,), whose sum is an integer K >= 1, are laid end to end in the given order, on a line of
    length K; the sample under each of the points ``start, start + 1, ..., start + K - 1`` is taken, 0 <= start < 1. The
    line is measured in integers, units of 2**-52 (coarser beyond 1023 samples), so that no rounding can ever lose a
    sample or take one twice. Each probability is exact within N units. Returns increasing indices, (K,); a ValueError
    if ``pi`` is not as described.
    """
    lengths, bits, k = _fixed_point(pi)
    order = np.asarray(order)
    points = int(start * 2.0**bits) + (np.arange(k) << bits)
    ends = np.add.accumulate(lengths[order])
    chosen: IntArray = order[ends.searchsorted(points, side='right')]
    chosen.sort()
    return chosen


def _fixed_point(pi: FloatArray) -> tuple[IntArray, int, int]:
    """``pi`` in units of ``2**-bits``, the sum exactly ``k``, each at most one; returned with ``bits`` and ``k``."""
    values = pi.tolist()
    total = math.fsum(values)
    k = round(total)
    if k < 1 or abs(total - k) > 1e-9 * k or min(values) < 0 or max(values) > 1:
        raise ValueError(f'pi={values} is not allowed: it must be numbers in [0, 1], whose sum is an integer >= 1')
    bits = min(52, 62 - len(values).bit_length())
    lengths = np.rint(pi * 2.0**bits).astype(np.int64)
    missing, row = (k << bits) - int(lengths.sum()), 0
    while missing:  # what rounding has added or taken is put right on the first samples with room for it
        length = int(lengths[row])
        lengths[row] = min(max(length + missing, 0), 1 << bits)
        missing -= int(lengths[row]) - length
        row += 1
    return lengths, bits, k


def horvitz_thompson_weights(pi: FloatArray, chosen: npt.ArrayLike) -> FloatArray:
    """``1 / (N * pi_i)`` of the drawn samples, (K,), which make their sum an unbiased estimate of the mean over all."""
    weights: FloatArray = 1.0 / (len(pi) * pi[np.asarray(chosen)])
    return weights
