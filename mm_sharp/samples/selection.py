"""Which samples of a mini-batch take part, as pure functions.

ESAM (Du et al. 2022, arXiv 2110.03141) differentiates, in its second pass, the samples whose loss the perturbation
raises most (:func:`top_k`)::

    chosen = the ceil(gamma * N) samples with the largest l_i(w + e) - l_i(w)

AUSAM (Deng et al., AAAI 2025, arXiv 2406.08001) draws samples by their scores, which are normalised within the
mini-batch (:func:`inclusion_probabilities`, :func:`systematic_sample`)::

    z_i  = (score_i - min) / (max - min)
    s_i  = s_min + (s_max - s_min) * z_i
    pi_i = K * s_i / sum(s),  capped at 1 and the excess redistributed;  K = ceil(sampling_ratio * N)

Ours, as the paper's text leaves them open: samples never seen take ``s_max``; equal scores give equal probabilities;
the probabilities are capped; samples are drawn systematically in random order, which gives exactly these inclusion
probabilities and exactly K samples; and the Horvitz-Thompson weights ``1 / (N * pi_i)``. Ours altogether:
:class:`Preference`, with which small scores are drawn more often (``1 - z_i``), and outliers do not stretch the scale.

The draws run on the host over numpy's float64: scores of at most some thousand samples are too few for a device.
:func:`top_k` takes tensors and stays on their device, since loss differences are computed there.
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

_LARGEST = float(np.finfo(np.float64).max)
_SUM_TOLERANCE = 1e-9


class Preference(NamedTuple):
    """How scores become ``z`` in [0, 1] (ours; the default is the paper's).

    Args:
        small: Small scores are drawn more often, and not large ones.
        quantile: Scores above this quantile of the seen ones in the mini-batch, in (0, 1], count as equal to it.
    """

    small: bool = False
    quantile: float = 1.0


_LARGE = Preference()


def sample_count(ratio: float, total: int, fewest: int = 1) -> int:
    """``ceil(ratio * total)``, and at least ``fewest`` where there are as many.

    Products are rounded to nine digits before: 7 % of 100 samples are 7 samples, though ``0.07 * 100 > 7`` in floating
    point (ours).

    Args:
        ratio: Fraction of the samples, in (0, 1]: AUSAM's ``sampling_ratio``, ESAM's ``gamma``.
        total: Samples in the batch, at least 1.
        fewest: The fewest samples that the model can train on, at least 1.

    Raises:
        ValueError: An argument is out of range.
    """
    # "not (a < b)" rather than "a >= b": nan fails every comparison.
    if not (_is_number(ratio) and 0 < ratio <= 1):
        raise _refusal('ratio', ratio, 'a number in (0, 1]')
    if isinstance(total, bool) or not isinstance(total, (int, np.integer)) or total < 1:
        raise _refusal('total', total, 'an integer of at least 1')
    return min(int(total), max(fewest, math.ceil(round(ratio * int(total), 9))))


def top_k(increases: Tensor, k: int) -> Tensor:
    """The ``k`` samples with the largest loss increase (ESAM's selection).

    Of equal increases the earlier sample goes first; +inf ranks before every number, and NaN after all else, -inf
    included. The authors' code compares with a strict ``>`` against the k-th value and so loses a sample; this does
    not.

    Args:
        increases: ``l_i(w + e) - l_i(w)``, shape (N,), floating, on any device.
        k: Number of samples, 1 to N.

    Returns:
        Indices in increasing order, shape (k,), int64, on the device of ``increases``. No host synchronisation.

    Raises:
        ValueError: ``increases`` is not a vector of floats, or ``k`` is out of range.
    """
    if increases.dim() != 1 or not increases.is_floating_point():
        found = f'a {increases.dtype} tensor of shape {tuple(increases.shape)}'
        raise ValueError(f'increases is {found}: it must be a vector of floats, one for each sample')
    _check_k(k, len(increases))
    unknown = increases.isnan()
    # 0 - x and not -x, so that both zeros are the same key to a radix sort. NaN gets a sort of its own: where a NaN
    # lands in a device's sort depends on its sign bit.
    keys = torch.where(unknown, math.inf, 0.0 - increases.detach())
    order = keys.sort(stable=True).indices
    order = order[unknown[order].to(torch.uint8).sort(stable=True).indices]
    return order[:k].sort().values


def inclusion_probabilities(
    scores: npt.ArrayLike, k: int, s_min: float = 0.3, s_max: float = 1.0, preference: Preference = _LARGE
) -> FloatArray:
    """The probability of each sample to be among the ``k`` that are drawn (AUSAM).

    ``s_max / s_min`` bounds how much likelier one sample is than another; a cap only brings them closer. One dominant
    score leaves all others at about ``s_min``, which is why the bound is there. An infinite score is the limit of that:
    it counts as the largest (or, negative, smallest) finite number. Samples never seen take ``s_max``, and so does
    every sample where the seen ones are all equal: the draw is then uniform.

    Args:
        scores: Average loss difference of each sample (units of the loss), shape (N,); NaN where never seen.
        k: Number of samples to draw, 1 to N.
        s_min: Normalised score of the smallest, > 0.
        s_max: Normalised score of the largest, >= ``s_min``. With ``s_min == s_max`` the draw is uniform.
        preference: With ``small``, ``s_min`` is the largest's, and ``s_max`` the smallest's.

    Returns:
        ``pi``, shape (N,), float64, in (0, 1]; its sum is ``k`` up to the rounding of the sum.

    Raises:
        ValueError: An argument is out of range, or ``scores`` is no vector of numbers.
    """
    values = _vector('scores', scores)
    _check_k(k, len(values))
    if not (_is_number(s_min) and 0 < s_min < math.inf):
        raise _refusal('s_min', s_min, 'a finite number > 0')
    if not (_is_number(s_max) and s_min <= s_max < math.inf):
        raise _refusal('s_max', s_max, f'a finite number of at least s_min ({s_min!r})')
    normalised = s_min + (s_max - s_min) * normalised_scores(values, preference)
    return _capped_shares(normalised, int(k))


def normalised_scores(scores: FloatArray, preference: Preference = _LARGE) -> FloatArray:
    """``z`` in [0, 1]: 0 for the smallest score, 1 for the largest, for the unknown, and where all are equal.

    Args:
        scores: Shape (N,), NaN where never seen; an infinite score counts as the largest finite number.
        preference: With ``small``, 1 is for the smallest and 0 for the largest.
    """
    unknown = np.isnan(scores)
    # Halved, so that the distance of two finite scores is finite.
    halves = np.clip(scores, -_LARGEST, _LARGEST) * 0.5
    known = halves[~unknown]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    if preference.quantile < 1.0 and len(known):
        high = np.quantile(known, preference.quantile)
        halves = np.minimum(halves, high)
    if not low < high:
        return np.ones_like(scores)
    shares = (halves - low) / (high - low)
    z: FloatArray = np.where(unknown, 1.0, 1.0 - shares if preference.small else shares)
    return z


def systematic_sample(pi: npt.ArrayLike, generator: torch.Generator) -> IntArray:
    """Draw ``sum(pi)`` distinct samples, sample i with probability exactly ``pi[i]``.

    "Exactly" within the fixed-point grid of :func:`systematic_choice`.

    Args:
        pi: Inclusion probabilities, shape (N,), in [0, 1]; their sum is an integer K >= 1.
        generator: Source of the random order and start, on the CPU. A ``torch.Generator``, because its state is one
            uint8 tensor: it goes into a checkpoint that loads with ``weights_only=True`` as it is.

    Returns:
        Indices in increasing order, shape (K,), int64.

    Raises:
        ValueError: ``pi`` is not as described.
    """
    probabilities = _vector('pi', pi)
    order = torch.randperm(len(probabilities), generator=generator).numpy()
    start = torch.rand((), dtype=torch.float64, generator=generator).item()
    return systematic_choice(probabilities, order, start)


def systematic_choice(pi: npt.ArrayLike, order: npt.ArrayLike, start: npt.ArrayLike) -> IntArray:
    """The samples that systematic sampling takes, given its random numbers.

    The probabilities are laid end to end in the given order, on a line of length K; the sample under each of the points
    ``start, start + 1, ..., start + K - 1`` is taken. The line is measured in integers, units of 2**-52 (coarser beyond
    1023 samples), so that no rounding can ever lose a sample or take one twice. Probabilities are those of the argument
    within N units.

    Args:
        pi: Inclusion probabilities, shape (N,), in [0, 1]; their sum is an integer K >= 1.
        order: Permutations of 0 to N - 1, shape (..., N).
        start: Starting points in [0, 1), shape (...).

    Returns:
        Indices in increasing order, shape (..., K), int64.

    Raises:
        ValueError: ``pi`` is not as described, or a start is outside [0, 1).
    """
    probabilities = _vector('pi', pi)
    orders, starts = np.asarray(order), np.asarray(start, dtype=np.float64)
    if orders.shape != (*starts.shape, len(probabilities)):
        expected = f'{starts.shape} of start and {len(probabilities)} samples'
        raise ValueError(f'order has shape {orders.shape}, which does not fit the shape {expected}')
    if not ((starts >= 0) & (starts < 1)).all():
        raise _refusal('start', start, 'in [0, 1)')
    lengths, bits, k = _fixed_point(probabilities)
    ends = np.cumsum(lengths[orders], axis=-1)
    first = np.floor(np.ldexp(starts, bits)).astype(np.int64)[..., np.newaxis]
    # Points before each end: ceil((end - first) / 2**bits). No length exceeds the distance of two points.
    points = (ends - first + ((1 << bits) - 1)) >> bits
    taken = np.diff(points, axis=-1, prepend=0) > 0
    chosen = orders[taken].astype(np.int64).reshape(*starts.shape, k)
    return np.sort(chosen, axis=-1)


def horvitz_thompson_weights(pi: npt.ArrayLike, chosen: npt.ArrayLike) -> FloatArray:
    """Weights that make the sum over the drawn samples an unbiased estimate of the mean over all (ours).

    Args:
        pi: Inclusion probabilities of all N samples, shape (N,).
        chosen: Indices of the drawn samples, shape (K,).

    Returns:
        ``1 / (N * pi_i)`` for each drawn sample, shape (K,), float64.

    Raises:
        ValueError: An index is out of range, or a drawn sample's probability is outside (0, 1].
    """
    probabilities, indices = _vector('pi', pi), np.asarray(chosen)
    total = len(probabilities)
    if indices.ndim != 1 or indices.dtype.kind not in 'iu' or ((indices < 0) | (indices >= total)).any():
        raise _refusal('chosen', chosen, f'a vector of indices from 0 to {total - 1}')
    drawn = probabilities[indices]
    if not ((drawn > 0) & (drawn <= 1)).all():
        raise _refusal('pi[chosen]', drawn, 'in (0, 1]')
    weights: FloatArray = 1.0 / (total * drawn)
    return weights


def _capped_shares(sizes: FloatArray, k: int) -> FloatArray:
    """``min(1, c * sizes)`` with the ``c`` that makes the sum ``k``; ``sizes`` > 0."""
    # The floor keeps a sum of sizes from vanishing where s_min / s_max does.
    sizes = np.maximum(sizes / sizes.max(), 1e-200)
    descending = np.sort(sizes)[::-1]
    # rest[j]: sum of all but the j largest, added up from the smallest.
    rest = np.cumsum(descending[::-1])[::-1]
    left = k - np.arange(len(sizes))
    # With the j largest capped, the next largest gets left * size / rest. The first j that keeps it within 1 is the
    # number of caps; the last sample's own share is left <= 1, so there is one.
    capped = int(np.argmax(left * descending <= rest))
    shares: FloatArray = np.minimum(1.0, left[capped] * sizes / rest[capped])
    return shares


def _fixed_point(pi: FloatArray) -> tuple[IntArray, int, int]:
    """``pi`` in units of ``2**-bits``, the sum exactly ``k``, each at most one; returned with ``bits`` and ``k``."""
    if not ((pi >= 0) & (pi <= 1)).all():
        raise _refusal('pi', pi, 'in [0, 1]')
    total = math.fsum(pi.tolist())
    k = round(total)
    if k < 1 or abs(total - k) > _SUM_TOLERANCE * k:
        raise ValueError(f'The sum of pi is {total!r}: it must be an integer of at least 1, the number to draw')
    bits = min(52, 62 - len(pi).bit_length())
    lengths = np.rint(np.ldexp(pi, bits)).astype(np.int64)
    missing = (k << bits) - int(lengths.sum())
    # What rounding added or took is put right on the first samples with room for it.
    room = np.cumsum((1 << bits) - lengths if missing > 0 else lengths)
    correction = np.diff(np.minimum(room, abs(missing)), prepend=0)
    return (lengths + correction if missing > 0 else lengths - correction), bits, k


def _vector(name: str, values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f'{name} has shape {array.shape}: it must be a vector with one number for each sample')
    return array


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_k(k: int, total: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= total:
        raise _refusal('k', k, f'an integer from 1 to the number of samples, {total}')


def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f'{name}={value!r} is not allowed: it must be {allowed}')
