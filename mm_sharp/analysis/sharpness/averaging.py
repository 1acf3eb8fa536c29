"""What the loss of one batch adds to the mean loss over all samples (ours).

The quantity that is measured is ``L(w) = 1/n sum_i l_i(w)`` over n samples, whatever the size of the batches in which
it is computed. A batch of b samples whose loss is T adds

    T / n       if T is the sum of its samples' losses (``KLDiscretLoss``: SimCC, RTMPose)
    T * b / n   if T is their mean

Which one it is, :mod:`mm_sharp.per_sample_loss` finds by comparison. So L is the training loss of a mean, and the
training loss divided by the batch size of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from mm_sharp.per_sample_loss import PerSampleLoss, PerSampleLossError, Reduction


class Averaging(Enum):
    """How a batch's loss counts."""

    SUM = 'sum over the batch'
    MEAN = 'mean over the batch'
    SINGLY = 'batches of one'  # a model that mixes sums and means: alone, a sample's sum and mean are the same
    SHARE = 'by share'  # not made of its samples' losses: what is measured depends on the batches

    def weight(self, size: int, total: int) -> float:
        """The factor of a batch of ``size`` of ``total`` samples."""
        return 1 / total if self is Averaging.SUM else size / total


@dataclass(frozen=True)
class LossForm:
    """What is known of a model's loss.

    Args:
        averaging: How batches are put together.
        name: The loss modules.
        remark: What a reader should know; '' if nothing.
    """

    averaging: Averaging
    name: str
    remark: str


def loss_form(model: nn.Module, compute: Callable[[], Tensor]) -> LossForm:
    """Find out whether a model's loss is a sum or a mean.

    Args:
        model: In evaluation mode.
        compute: Computes the loss of a batch, with the model, ().
    """
    try:
        with torch.no_grad(), PerSampleLoss(model).record() as record:
            total = compute()
        record.losses(total)
    except PerSampleLossError as error:
        remark = (
            f"the model's loss is not made of losses of single samples ({error.what}): batches count by their size, "
            'and what is measured depends on --batch-size'
        )
        return LossForm(Averaging.SHARE, type(model).__name__, remark)
    name = ', '.join(dict.fromkeys(term.name for term in record.terms))
    if record.reduction is None:
        remark = (
            'the model adds losses that are sums over the batch to means: each sample is measured as a batch of one'
        )
        return LossForm(Averaging.SINGLY, name, remark)
    if record.reduction is Reduction.SUM:
        remark = (
            'training adds the losses of a batch up: its loss, gradient, curvature and rises are these times its size'
        )
        return LossForm(Averaging.SUM, name, remark)
    return LossForm(Averaging.MEAN, name, '')
