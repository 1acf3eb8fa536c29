"""What one forward pass gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm_sharp.ops.host_copy import HostCopy, host_waits
from mm_sharp.per_sample_loss.find import NAMING_RULE, PerSampleLossError
from mm_sharp.per_sample_loss.reduction import HALF, ROUNDING, STRICT, Reduction

LOOSE = 1e-3


@dataclass
class LossTerm:
    """One loss that a forward pass computed.

    Args:
        name: Where it comes from, for messages.
        values: l_i, (N,), float32, detached, as the model adds them up.
        reduction: What the batch's loss is of them.
        combined: The batch's loss made of them again, (), float32; weighted, where the samples are.
        replaced: What the loss module returned, (), float32, where a weighted loss took its place; otherwise None.
    """

    name: str
    values: Tensor
    reduction: Reduction
    combined: Tensor
    replaced: Tensor | None = None

    def scale(self) -> float:
        """The size of what is added up: sums that cancel are no more exact than that."""
        return self.reduction.combine(self.values.abs()).item()


@dataclass
class Checks:
    """The comparisons of a model's records with what the model returned; shared by all of them."""

    passed_once: bool = False
    _under_way: list[tuple[LossRecord, HostCopy, float]] = field(default_factory=list)

    def run(self, record: LossRecord, total: Tensor) -> None:
        """Compare a record with the total loss, ().

        On the CPU it is said at once. An accelerator compares without the host waiting for it, but for the very first
        time, and :meth:`settle` says what came out.

        Raises:
            PerSampleLossError: They differ.
        """
        tolerance = HALF if record.half else LOOSE if self.passed_once else STRICT
        pairs = record.pairs(total)
        if self.passed_once and host_waits(total.device):
            self._under_way.append((record, HostCopy(pairs), tolerance))
        else:
            self.passed_once |= record.judge(pairs.tolist(), tolerance)

    def settle(self) -> None:
        """Say what the comparisons have shown that are not said yet; waits for them.

        Raises:
            PerSampleLossError: One of them has shown a difference.
        """
        if self._under_way:
            under_way, self._under_way = self._under_way, []
            for record, copy, tolerance in under_way:
                record.judge(copy.numpy().tolist(), tolerance)


@dataclass
class LossRecord:
    """The losses of the samples in one forward pass; filled while the context of ``record()`` is open.

    Args:
        owner: The model's class, for messages.
        size: Samples in the batch, N; None before the forward.
        terms: One for every loss computed.
        half: Whether autocast to 16 bits was on; the total is then compared with a tolerance of 2 %.
        checks: The comparisons of this model's records. The first one allows a relative difference of 1e-5; later ones
            allow 1e-3, since a sum that cancels is no reason to stop a training.
        weights: Weights of the samples, (N,), or None; see :meth:`PerSampleLoss.record`.
        full_size: The number of samples from which these were drawn, or None.
    """

    owner: str
    size: int | None = None
    terms: list[LossTerm] = field(default_factory=list)
    half: bool = False
    checks: Checks = field(default_factory=Checks)
    weights: Tensor | None = None
    full_size: int | None = None

    def losses(self, total: Tensor) -> Tensor:
        """The loss of every sample, as the model would return it for this sample alone.

        Args:
            total: The loss that the model is trained on: ``parse_losses`` of its output, ().

        Returns:
            (N,), float32, detached. With one :attr:`reduction` for all terms, their sum or mean is ``total`` (if no
            weights were given); a model that mixes sums and means has no such identity.

        Raises:
            PerSampleLossError: Nothing was recorded, or what was recorded does not add up to ``total``, or (with
                weights) what a loss module returned is neither sum nor mean of its samples. On an accelerator all but
                the first comparison are reported by :meth:`Checks.settle`.
        """
        if not self.terms:
            raise PerSampleLossError(
                f'{self.owner}: no loss module was called; {NAMING_RULE}. Calls such as F.mse_loss(...) cannot be '
                'seen: make the loss a module, self.loss = nn.MSELoss() in __init__ and self.loss(output, target) in '
                'forward, or return losses of shape (N,), one for each sample.'
            )
        self.checks.run(self, total.detach())
        return _added([term.values for term in self.terms])

    def values(self) -> Tensor | None:
        """:meth:`losses` without any check, for messages; None where nothing was recorded."""
        return _added([term.values for term in self.terms]) if self.terms else None

    @property
    def reduction(self) -> Reduction | None:
        """What the total is of :meth:`losses`: SUM, MEAN, or None where the model mixes them."""
        kinds = {term.reduction for term in self.terms}
        return kinds.pop() if len(kinds) == 1 else None

    def subset_factor(self, kept: int, of: int) -> float:
        """The factor by which the loss on ``kept`` of ``of`` samples must be multiplied: N/K for sums, 1 for means.

        Raises:
            ValueError: The counts are out of range, or the model mixes sums and means, so that there is no one factor;
                ``record(full_size=of)`` scales each loss by its own.
        """
        if self.reduction is None:
            kinds = ', '.join(f'{term.name}: {term.reduction.value}' for term in self.terms)
            raise ValueError(f'{self.owner} has no one factor for a subset ({kinds}): use record(full_size={of})')
        return self.reduction.subset_factor(kept, of)

    def pairs(self, total: Tensor) -> Tensor:
        """Values and what they must be, in turn: the sum over all terms, and ``total``; then, for every term that was
        replaced, what its samples give without their weights, and what the loss module returned.
        """
        pairs = [_added([term.combined for term in self.terms]), total]
        for term in self.terms:
            if term.replaced is not None:
                pairs += [term.reduction.combine(term.values), term.replaced]
        return torch.stack([value.to(total.device, torch.float32) for value in pairs])

    def judge(self, pairs: Sequence[float], tolerance: float) -> bool:
        """Compare what :meth:`pairs` gave; returns whether there was anything to compare with.

        Raises:
            PerSampleLossError: A value differs by more than the relative ``tolerance``.
        """
        replaced = [term for term in self.terms if term.replaced is not None]
        for term, value, expected in zip(replaced, pairs[2::2], pairs[3::2], strict=True):
            if _differ(value, expected, tolerance, [term]):
                raise PerSampleLossError(
                    f'{term.name}: on a batch of {term.values.numel()} it is {expected:.6g}, but the '
                    f'{term.reduction.value} of its samples alone is {value:.6g}: it is neither the sum nor the '
                    'mean of its samples.'
                )
        value, expected = pairs[:2]
        if _differ(value, expected, tolerance, self.terms):
            names = '; '.join(f'{term.name} = {term.combined.item():.6g}' for term in self.terms)
            raise PerSampleLossError(
                f'{self.owner}: its loss modules give {value:.6g} ({names}), but its total loss is {expected:.6g}. '
                'Either one of them is neither the sum nor the mean of its samples, or something scales, drops or adds '
                "a loss outside of them: a weight belongs into the loss's own config (loss_weight=...), and a further "
                f'term into a loss module ({NAMING_RULE}).'
            )
        return math.isfinite(expected)


def _differ(value: float, expected: float, tolerance: float, terms: Sequence[LossTerm]) -> bool:
    # An overflow in 16 bits is no reason to stop; one sample's nan in a finite loss (ignored labels) is.
    if not math.isfinite(expected) or abs(value - expected) <= tolerance * abs(expected) + ROUNDING:
        return False
    return not abs(value - expected) <= tolerance * sum(term.scale() for term in terms) + ROUNDING


def _added(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum(0)
