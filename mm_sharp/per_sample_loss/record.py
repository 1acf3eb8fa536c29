"""What one forward pass gave (ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm_sharp.per_sample_loss.facts import HALF, STRICT
from mm_sharp.per_sample_loss.find import PerSampleLossError
from mm_sharp.per_sample_loss.reduction import Reduction

LOOSE = 1e-3


@dataclass
class LossTerm:
    """One loss that a forward pass computed.

    Args:
        name: Where it comes from, for messages.
        values: l_i, (N,), float32, detached, as the model adds them up.
        reduction: What the batch's loss is of them.
        combined: The batch's loss made of them again, (), float32.
    """

    name: str
    values: Tensor
    reduction: Reduction
    combined: Tensor


@dataclass
class Verified:
    """Whether a model's records have passed their check once; shared by all of them."""

    once: bool = False


@dataclass
class LossRecord:
    """The losses of the samples in one forward pass; filled while the context of ``record()`` is open.

    Args:
        owner: The model's class, for messages.
        size: Samples in the batch, N; None before the forward.
        terms: One for every loss computed.
        half: Whether autocast to 16 bits was on; the total is then compared with a tolerance of 2 %.
        verified: Whether an earlier record of this model passed its check. The first check allows a relative
            difference of 1e-5; later ones allow 1e-3, since a sum that cancels is no reason to stop a training, and
            are made on the CPU only: on an accelerator they would wait for the device.
        weights: Weights of the samples, (N,), or None; see :meth:`PerSampleLoss.record`.
        full_size: The number of samples from which these were drawn, or None.
    """

    owner: str
    size: int | None = None
    terms: list[LossTerm] = field(default_factory=list)
    half: bool = False
    verified: Verified = field(default_factory=Verified)
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
            PerSampleLossError: Nothing was recorded, or what was recorded does not add up to ``total``.
        """
        if not self.terms:
            raise PerSampleLossError(
                f'{self.owner}: no loss module was called. Calls such as F.mse_loss(...) cannot be seen: make the loss '
                'a module, self.loss = nn.MSELoss() in __init__ and self.loss(output, target) in forward, or return '
                'losses of shape (N,), one for each sample.'
            )
        if not self.verified.once or total.device.type == 'cpu':
            self.verified.once |= self._check(total.detach())
        return torch.stack([term.values for term in self.terms]).sum(0)

    def values(self) -> Tensor | None:
        """:meth:`losses` without any check, for messages; None where nothing was recorded."""
        return torch.stack([term.values for term in self.terms]).sum(0) if self.terms else None

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

    def _check(self, total: Tensor) -> bool:
        """Compare with the total; returns whether there was anything to compare with."""
        parts = torch.stack([term.combined for term in self.terms]).to(total.device, torch.float64)
        sizes = [term.values.abs() for term in self.terms]
        scales = [s.sum() if t.reduction is Reduction.SUM else s.mean() for s, t in zip(sizes, self.terms, strict=True)]
        recorded, expected, scale = torch.stack(
            [parts.sum(), total.double(), torch.stack(scales).sum().to(parts)]
        ).tolist()
        tolerance = HALF if self.half else LOOSE if self.verified.once else STRICT
        difference = abs(recorded - expected)
        # An overflow in 16 bits is no reason to stop; one sample's nan in a finite total (ignored labels) is.
        if math.isfinite(expected) and not difference <= tolerance * max(abs(expected), scale) + 1e-8:
            names = '; '.join(f'{term.name} = {term.combined.item():.6g}' for term in self.terms)
            raise PerSampleLossError(
                f'{self.owner}: its loss modules give {recorded:.6g} ({names}), but its total loss is '
                f'{expected:.6g}. Something scales, drops or adds a loss outside of the loss modules; a weight belongs '
                "into the loss's own config (loss_weight=...), and a further term into a loss module."
            )
        return math.isfinite(expected)
