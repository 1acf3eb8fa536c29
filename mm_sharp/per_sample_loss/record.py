"""What one forward pass gave, and its comparison with what the model returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from mm_sharp.per_sample_loss.find import NAMING_RULE, PerSampleLossError

ROUNDING = 1e-8  # of a loss that is zero


class Reduction(Enum):
    """What a loss of N samples is of their losses as batches of one, l_i."""

    SUM = 'sum'
    MEAN = 'mean'

    def subset_factor(self, kept: int, of: int) -> float:
        """The factor that makes a loss on ``kept`` of ``of`` samples as large as one on all of them: N/K or 1."""
        if not 1 <= kept <= of:
            raise ValueError(f'kept={kept} of of={of} samples is not allowed: it must be 1 <= kept <= of')
        return of / kept if self is Reduction.SUM else 1.0

    def combine(self, values: Tensor, weights: Tensor | None = None, full_size: int | None = None) -> Tensor:
        """The loss of K samples with losses l_i, (K,), that were drawn from ``full_size`` (K).

        With weights w_i, (K,), it is sum_i w_i l_i for means and ``full_size`` * sum_i w_i l_i for sums; without,
        w_i = 1/K. With inclusion probabilities pi_i and w_i = 1 / (N * pi_i) (Horvitz-Thompson), it is an unbiased
        estimate of the module's loss on all N.
        """
        count = values.numel()
        full_size = count if full_size is None else full_size
        if weights is None:
            return values.mean() if self is Reduction.MEAN else values.sum() * (full_size / count)
        total = (values * weights.to(values)).sum()
        return total if self is Reduction.MEAN else total * full_size


@dataclass
class LossTerm:
    """One loss that a forward pass computed."""

    name: str  # where it comes from, for messages
    values: Tensor  # l_i, (N,), float32, detached, as the model adds them up
    reduction: Reduction  # what the batch's loss is of them
    combined: Tensor  # the batch's loss made of them again, (), float32; weighted, where the samples are
    replaced: Tensor | None = None  # what the loss module returned, (), float32, where a weighted loss took its place


@dataclass
class LossRecord:
    """The losses of the samples in one forward pass; filled while the context of ``record()`` is open."""

    owner: str  # the model's class, for messages
    check: Callable[[LossRecord, Tensor], None]  # compares a record with the total loss
    weights: Tensor | None = None  # of the samples, (N,); see PerSampleLoss.record
    full_size: int | None = None  # the number of samples from which these were drawn
    size: int | None = None  # samples in the batch, N; None before the forward
    terms: list[LossTerm] = field(default_factory=list)  # one for every loss computed
    unreduced: list[str] = field(default_factory=list)  # the losses that gave a row for every sample, for messages
    half: bool = False  # whether autocast to 16 bits was on

    def losses(self, total: Tensor) -> Tensor:
        """The loss of every sample, as the model would return it for this sample alone: (N,), float32, detached.

        ``total`` is the loss that the model is trained on, (): ``parse_losses`` of its output.

        Raises:
            PerSampleLossError: Nothing was recorded, or what was recorded is not what the model computed. On an
                accelerator all but the first comparison are reported by :meth:`PerSampleLoss.flush`.
        """
        values = self.values()
        if values is None and self.unreduced:
            raise PerSampleLossError(
                f"{self.unreduced[0]} does not reduce its losses (reduction='none'), and what the model makes of them "
                "cannot be seen: let it take their mean or sum (reduction='mean'), or return losses of shape (N,), one "
                'for each sample.'
            )
        if values is None:
            raise PerSampleLossError(
                f'{self.owner}: no loss module was called; {NAMING_RULE}. Calls such as F.mse_loss(...) cannot be '
                'seen: make the loss a module, self.loss = nn.MSELoss() in __init__ and self.loss(output, target) in '
                'forward, or return losses of shape (N,), one for each sample.'
            )
        self.check(self, total.detach())
        return values

    def values(self) -> Tensor | None:
        """:meth:`losses` without any check, for messages; None where nothing was recorded."""
        return _added([term.values for term in self.terms]) if self.terms else None

    @property
    def reduction(self) -> Reduction | None:
        """What the total is of :meth:`losses`: SUM, MEAN, or None where the model mixes them."""
        kinds = {term.reduction for term in self.terms}
        return kinds.pop() if len(kinds) == 1 else None

    def subset_factor(self, kept: int, of: int) -> float:
        """What the loss on ``kept`` of ``of`` samples must be multiplied by: N/K for sums, 1 for means."""
        if self.reduction is None:
            kinds = ', '.join(f'{term.name}: {term.reduction.value}' for term in self.terms)
            raise ValueError(f'{self.owner} has no one factor for a subset ({kinds}): use record(full_size={of})')
        return self.reduction.subset_factor(kept, of)

    def pairs(self, total: Tensor) -> list[Tensor]:
        """What :meth:`judge` compares: all terms and ``total``; each replaced loss, unweighted, and its module's."""
        pairs = [_added([term.combined for term in self.terms]), total]
        for term in self.terms:
            if term.replaced is not None:
                pairs += [term.reduction.combine(term.values), term.replaced]
        return pairs

    def judge(self, pairs: Sequence[float], tolerance: float) -> bool:
        """Raise where values differ by more than ``tolerance``; returns whether there was anything to compare with."""
        checked = [self.terms, *([term] for term in self.terms if term.replaced is not None)]
        for terms, value, expected in zip(checked, pairs[::2], pairs[1::2], strict=True):
            if _differ(value, expected, tolerance, terms):
                names = '; '.join(f'{term.name} = {term.combined.item():.6g}' for term in terms)
                raise PerSampleLossError(
                    f'{self.owner}: the losses of its samples give {value:.6g} ({names}), but its own loss is '
                    f'{expected:.6g}. Either a loss is neither the sum nor the mean of its samples, or something '
                    "scales, drops or adds a loss outside of its module: a weight belongs into the loss's own config "
                    f'(loss_weight=...), and a further term into a loss module ({NAMING_RULE}); every number that a '
                    'loss module returns is taken for a loss, so that it must not return others beside it.'
                )
        return math.isfinite(pairs[1])


def _differ(value: float, expected: float, tolerance: float, terms: Sequence[LossTerm]) -> bool:
    # An overflow in 16 bits is no reason to stop; one sample's nan in a finite loss (ignored labels) is.
    difference = abs(value - expected)
    if not math.isfinite(expected) or difference <= tolerance * abs(expected) + ROUNDING:
        return False
    # Sums that cancel are no more exact than what is added up.
    size = sum(term.reduction.combine(term.values.abs()).item() for term in terms)
    return not difference <= tolerance * size + ROUNDING


def _added(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum(0)
