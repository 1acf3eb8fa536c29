"""AUSAM's step written out by hand, in plain torch and plain Python: what the wrapper is compared with.

Nothing here uses the package, MMEngine's optimizer wrappers, numpy's or torch's vector functions for the probabilities,
or hooks. What the wrapper draws at random (the rows of each batch) is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from tests.references import asam_perturbation, gradients_of, sam_perturbation

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One of a model's losses on K samples.

    Args:
        values: The loss of each sample alone, (K,).
        whole: The loss of the K samples together, ().
        is_sum: Whether ``whole`` is the sum of ``values``; otherwise it is their mean.
    """

    values: Tensor
    whole: Tensor
    is_sum: bool = False


Formula = Callable[[Tensor, Tensor], list[Term]]


def mean_squares(output: Tensor, targets: Tensor) -> Term:
    """Mean squared error, a mean over the batch."""
    return Term(((output - targets) ** 2).mean(1), F.mse_loss(output, targets))


def sum_squares(output: Tensor, targets: Tensor) -> Term:
    """Sum of squared errors, a sum over the batch."""
    return Term(((output - targets) ** 2).sum(1), F.mse_loss(output, targets, reduction='sum'), is_sum=True)


def mean_sizes(output: Tensor, targets: Tensor) -> Term:
    """A small penalty on large outputs, a mean over the batch."""
    return Term(0.01 * output.abs().mean(1), 0.01 * output.abs().mean())


def terms(*formulas: Callable[[Tensor, Tensor], Term]) -> Formula:
    """Several losses of one model."""
    return lambda output, targets: [formula(output, targets) for formula in formulas]


def inclusion_probabilities(
    scores: Sequence[float | None],
    k: int,
    s_min: float,
    s_max: float,
    prefer: str = 'large',
    clip_quantile: float = 1.0,
) -> list[float]:
    """pi by min-max normalisation, and by capping and spreading the excess until nothing is above 1.

    Args:
        scores: None where a sample was never seen.
        k: How many are drawn.
        s_min: Normalised score of the smallest.
        s_max: Normalised score of the largest, and of those never seen.
        prefer: 'large' or 'small', which turns largest and smallest round.
        clip_quantile: Where the scores seen are cut off; linear between two of them.
    """
    seen = sorted(score for score in scores if score is not None)
    low, high = (seen[0], quantile(seen, clip_quantile)) if seen else (0.0, 0.0)
    sizes = []
    for score in scores:
        z = 1.0 if score is None or low == high else (min(score, high) - low) / (high - low)
        if prefer == 'small' and score is not None and low < high:
            z = 1.0 - z
        sizes.append(s_min + (s_max - s_min) * z)
    pi = [0.0] * len(sizes)
    free, left = list(range(len(sizes))), k
    while free:
        total = sum(sizes[i] for i in free)
        for i in free:
            pi[i] = left * sizes[i] / total
        over = [i for i in free if pi[i] > 1]
        if not over:
            break
        for i in over:
            pi[i] = 1.0
        free, left = [i for i in free if i not in over], left - len(over)
    return pi


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of the distance from the first to the last of them leads to."""
    place = share * (len(ordered) - 1)
    before = min(int(place), len(ordered) - 1)
    after = min(before + 1, len(ordered) - 1)
    return ordered[before] + (place - before) * (ordered[after] - ordered[before])


def rounded(number: float) -> float:
    """``number`` as float32 holds it."""
    return float(struct.unpack('f', struct.pack('f', number))[0])


@dataclass
class ReferenceAUSAM:
    """AUSAM on a model whose ``mode='tensor'`` gives the output that ``formula`` makes losses of.

    Args:
        model: Its buffers end as the first pass left them.
        optimizer: The base optimizer over all parameters of ``model``.
        formula: The model's losses.
        rho: Radius.
        adaptive: ASAM's perturbation.
        s_min: Normalised score of the smallest.
        s_max: Normalised score of the largest.
        reweight: Weight sample i by 1 / (N * pi_i).
        history_momentum: Weight of the past; None for the average over all visits.
        prefer: Which scores are drawn more often.
        clip_quantile: Where scores are cut off.

    Attributes:
        history: By sample id, the average absolute loss difference and the number of visits.
    """

    model: nn.Module
    optimizer: Optimizer
    formula: Formula
    rho: float = 0.05
    adaptive: bool = False
    s_min: float = 0.3
    s_max: float = 1.0
    reweight: bool = False
    history_momentum: float | None = None
    prefer: str = 'large'
    clip_quantile: float = 1.0
    history: dict[int, tuple[float, int]] = field(default_factory=dict)

    def step(self, batch: Batch, rows: Sequence[int]) -> list[float]:
        """One whole step on ``rows`` of ``batch``.

        Returns:
            The inclusion probabilities of all samples of ``batch``.
        """
        ids = batch['sample_idx'].tolist()
        scores = [self.history[i][0] if i in self.history else None for i in ids]
        pi = inclusion_probabilities(scores, len(rows), self.s_min, self.s_max, self.prefer, self.clip_quantile)
        weights = [1 / (len(ids) * pi[row]) for row in rows] if self.reweight else None
        final, differences = self._passes(batch['inputs'][rows], batch['targets'][rows], weights, len(ids))
        for parameter, gradient in zip(self.model.parameters(), final, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._remember([ids[row] for row in rows], differences)
        return pi

    def _passes(
        self, inputs: Tensor, targets: Tensor, weights: list[float] | None, size: int
    ) -> tuple[list[Tensor], list[float]]:
        """The final gradient and l_i(w + e) - l_i(w); weights and buffers end as after the first pass."""
        parameters = list(self.model.parameters())
        before, loss = self._losses(inputs, targets, weights, size)
        gradients = gradients_of(loss, parameters)
        kept = [tensor.detach().clone() for tensor in (*parameters, *self.model.buffers())]
        if self.adaptive:
            perturbation = asam_perturbation([p.detach() for p in parameters], gradients, self.rho)
        else:
            perturbation = sam_perturbation(gradients, self.rho)
        with torch.no_grad():
            for parameter, step in zip(parameters, perturbation, strict=True):
                parameter.add_(step)
        after, loss = self._losses(inputs, targets, weights, size)
        final = gradients_of(loss, parameters)
        with torch.no_grad():
            for tensor, copy in zip((*parameters, *self.model.buffers()), kept, strict=True):
                tensor.copy_(copy)
        return final, (after - before).tolist()

    def _losses(self, inputs: Tensor, targets: Tensor, weights: list[float] | None, size: int) -> tuple[Tensor, Tensor]:
        """l_i of each sample, (K,), and the loss to differentiate."""
        losses = self.formula(self.model(inputs, targets, mode='tensor'), targets)
        values = torch.stack([term.values.detach() for term in losses]).sum(0)
        total = torch.zeros(())
        for term in losses:
            if weights is None:
                total = total + term.whole * (size / len(inputs) if term.is_sum else 1.0)
            else:
                mean = (term.values * torch.tensor(weights)).sum()
                total = total + mean * (size if term.is_sum else 1)
        return values, total

    def _remember(self, ids: list[int], differences: list[float]) -> None:
        """Take up one visit of each of ``ids``, which are different."""
        for number, difference in zip(ids, differences, strict=True):
            average, visits = self.history.get(number, (0.0, 0))
            if self.history_momentum is None:
                past, new = float(visits), 1.0
            else:  # m * v + (1 - m) * x from 0 on, divided by the weight 1 - m**n that n visits have together
                past, new = self.history_momentum * (1 - self.history_momentum**visits), 1 - self.history_momentum
            # In this order of operations, so that it rounds to the same float32.
            average = past / (past + new) * average + new / (past + new) * abs(difference)
            self.history[number] = (rounded(average), visits + 1)
