"""ESAM's step written out by hand, in plain torch: what the wrapper is compared with.

Nothing here uses the package, MMEngine's optimizer wrappers, ``torch._foreach_*`` or hooks. What the wrapper draws at
random (masks, the order of equal samples) is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from tests.references import gradients_of, perturbation_of

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ToyLoss:
    """The loss of ``ToyNet`` by formula.

    Args:
        square_sum: Whether the squared error is a sum over the batch; otherwise a mean.
        size_sum: The same for the penalty on large outputs.
    """

    square_sum: bool = False
    size_sum: bool = False

    def samples(self, output: Tensor, targets: Tensor) -> Tensor:
        """l_i, (N,): the loss of each sample alone, given the output of the whole batch."""
        squares, sizes = (output - targets) ** 2, 0.01 * output.abs()
        square = squares.sum(1) if self.square_sum else squares.mean(1)
        return square + (sizes.sum(1) if self.size_sum else sizes.mean(1))

    def batch(self, output: Tensor, targets: Tensor, whole: int) -> Tensor:
        """The loss of K of ``whole`` samples; sums are longer by ``whole / K``."""
        longer = whole / len(output)
        square = F.mse_loss(output, targets, reduction='sum' if self.square_sum else 'mean')
        size = 0.01 * (output.abs().sum() if self.size_sum else output.abs().mean())
        return square * (longer if self.square_sum else 1.0) + size * (longer if self.size_sum else 1.0)


@dataclass
class ReferenceESAM:
    """ESAM on a ``ToyNet``.

    Args:
        model: Its buffers end as the first pass left them.
        optimizer: The base optimizer over all parameters of ``model``.
        rho: Radius.
        beta: Probability of each tensor to be perturbed; here only the factor 1 / beta.
        gamma: Share of the samples in the second pass.
        refresh: None for the exact selection; otherwise selection by history, measured on one step in so many.
        adaptive: The wrapper's argument.
        loss: The model's loss.

    Attributes:
        history: By sample id, the mean of the absolute loss differences and their number.
        rows: The rows of the last step's second pass, and all steps' before.
        scores: What the last selection ranked by, None where a sample had no history.
    """

    model: nn.Module
    optimizer: Optimizer
    rho: float = 0.05
    beta: float = 0.6
    gamma: float = 0.5
    refresh: int | None = None
    adaptive: bool | str = False
    loss: ToyLoss = ToyLoss()
    history: dict[int, tuple[float, int]] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)

    def step(self, batch: Batch, mask: Sequence[bool], order: Sequence[int]) -> None:
        """One whole step.

        Args:
            batch: N samples.
            mask: For each parameter tensor, whether it is perturbed.
            order: A permutation of the rows: of samples with equal history the first in it are taken.
        """
        for parameter, gradient in zip(self.model.parameters(), self.gradients(batch, mask, order), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, batch: Batch, mask: Sequence[bool], order: Sequence[int]) -> list[Tensor]:
        """The final gradient; weights and buffers end as after the first pass."""
        parameters = list(self.model.parameters())
        chosen = [parameter for parameter, taken in zip(parameters, mask, strict=True) if taken]
        size = len(batch['targets'])
        output = self.model(**batch, mode='tensor')
        gradients = gradients_of(self.loss.batch(output, batch['targets'], size), chosen)
        weights = [parameter.detach().clone() for parameter in parameters]
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self._climb(chosen, gradients)
        rows = self._select(batch, output.detach(), order)
        part = {name: value[rows] for name, value in batch.items()}
        second = self.loss.batch(self.model(**part, mode='tensor'), part['targets'], size)
        final = gradients_of(second, parameters)
        with torch.no_grad():
            for tensor, kept in zip([*parameters, *self.model.buffers()], [*weights, *buffers], strict=True):
                tensor.copy_(kept)
        self.rows.append(rows)
        return final

    @torch.no_grad()
    def _climb(self, chosen: list[nn.Parameter], gradients: list[Tensor]) -> None:
        weights = [parameter.detach() for parameter in chosen]
        perturbation = perturbation_of(weights, gradients, self.rho / self.beta, self.adaptive)
        for parameter, step in zip(chosen, perturbation, strict=True):
            parameter.add_(step)

    @torch.no_grad()
    def _select(self, batch: Batch, output: Tensor, order: Sequence[int]) -> list[int]:
        """The rows of the second pass; the weights are the perturbed ones."""
        size = len(output)
        count = math.ceil(self.gamma * size)
        if count == size:
            return list(range(size))
        ids = batch['sample_idx'].tolist()
        if self.refresh is not None and len(self.rows) % self.refresh:
            scores = [self.history[i][0] if i in self.history else None for i in ids]
            measured = [score for score in scores if score is not None]
            neutral = sum(measured) / len(measured) if measured else 0.0
            ranking = sorted(order, key=lambda row: neutral if scores[row] is None else scores[row], reverse=True)
        else:
            after = self.loss.samples(self.model(**batch, mode='tensor'), batch['targets'])
            scores = (after - self.loss.samples(output, batch['targets'])).tolist()
            ranking = sorted(range(size), key=scores.__getitem__, reverse=True)
            if self.refresh is not None:
                self._remember(ids, scores)
        self.scores.append(scores)
        return sorted(ranking[:count])

    def _remember(self, ids: list[int], differences: list[float]) -> None:
        for number, difference in zip(ids, differences, strict=True):
            mean, visits = self.history.get(number, (0.0, 0))
            self.history[number] = ((mean * visits + abs(difference)) / (visits + 1), visits + 1)
