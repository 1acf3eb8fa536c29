"""Whether a batch's loss is the sum of its samples' losses, their mean, or neither."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor, nn

ROUNDING = 1e-8  # of a loss that is zero
STRICT, HALF = 1e-5, 2e-2  # relative differences allowed between float32 losses, and under autocast to 16 bits


class Reduction(Enum):
    """What a loss of N samples is of their losses as batches of one, l_i."""

    SUM = 'sum'
    MEAN = 'mean'
    NEITHER = 'neither'

    def subset_factor(self, kept: int, of: int) -> float:
        """The factor that makes a loss on ``kept`` of ``of`` samples as large as one on all of them: N/K or 1.

        Raises:
            ValueError: Neither sum nor mean, or the counts are out of range.
        """
        if not 1 <= kept <= of:
            raise ValueError(f'kept={kept} of of={of} samples is not allowed: it must be 1 <= kept <= of')
        if self is Reduction.NEITHER:
            raise ValueError('a loss that is neither sum nor mean of its samples has no factor for a subset')
        return of / kept if self is Reduction.SUM else 1.0

    def combine(self, values: Tensor, weights: Tensor | None = None, full_size: int | None = None) -> Tensor:
        """The loss that the module stands for.

        With weights w_i it is sum_i w_i l_i for means and ``full_size`` * sum_i w_i l_i for sums. Without weights,
        w_i = 1/K for each of the K values, so that ``full_size`` = K gives what the module itself returns.

        Args:
            values: The losses l_i, (K,).
            weights: (K,); ``1 / (N * pi_i)`` (Horvitz-Thompson) for K samples drawn from N with inclusion
                probabilities pi_i, which makes the result an unbiased estimate of the module's loss on all N.
            full_size: N, the samples from which these K were drawn; K if None.
        """
        count = values.numel()
        full_size = count if full_size is None else full_size
        if weights is None:
            return values.mean() if self is Reduction.MEAN else values.sum() * (full_size / count)
        total = (values * weights.to(values)).sum()
        return total if self is Reduction.MEAN else total * full_size


def is_neither(module: nn.Module) -> bool:
    """Whether a loss divides by a count over the batch, or compares samples with each other.

    On a batch where the counts are equal it looks like a mean, so the comparison cannot tell.
    """
    return any(map(_is_neither, module.modules()))


def compare(values: Tensor, returned: Tensor, tolerance: float) -> Reduction | None:
    """Compare a batch's loss with its samples' losses.

    Args:
        values: l_i, (N,), N >= 2.
        returned: The batch's loss, ().
        tolerance: Largest allowed relative difference, as a fraction of the sum (mean) of \\|l_i\\|.

    Returns:
        What it is; None where the values cannot tell: all zero, as the batch's loss then is, or not all finite.
    """
    values, count = values.double(), values.numel()
    total, size, loss = torch.stack([values.sum(), values.abs().sum(), returned.double()]).tolist()
    is_sum = abs(loss - total) <= tolerance * size
    is_mean = abs(loss - total / count) <= tolerance * size / count
    all_zero = size == 0 and abs(loss) <= ROUNDING
    if all_zero or not math.isfinite(size + loss) or (is_sum and is_mean):
        return None
    if is_sum:
        return Reduction.SUM
    return Reduction.MEAN if is_mean else Reduction.NEITHER


def _is_neither(module: nn.Module) -> bool:
    # MMPose's classes, and those derived from them.
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith('mmpose.')}
    if names & {'BoneLoss', 'FocalHeatmapLoss', 'SemiSupervisionLoss', 'InfoNCELoss'}:
        return True
    if 'SoftWeightSmoothL1Loss' in names:
        return bool(module.use_target_weight) and not module.supervise_empty
    if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return module.weight is not None and module.reduction == 'mean'
    return False
