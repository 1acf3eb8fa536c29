"""Gradients of the two passes, kept apart from each other and from accumulated ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Of each pair of tensors, taken as real vectors, the inner product: scalars of at least float32."""
    return [torch.dot(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    # A complex number is two real ones.
    flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


class GradientStash:
    """The gradients that were accumulated before this step, of everything that a backward pass may give one to.

    ``in_buckets``: they may lie in memory that a backward pass of DDP writes to (``gradient_as_bucket_view``).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, in_buckets: bool = False) -> None:
        self._parameters = parameters
        self._gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
        self._values = self._gradients
        self._used: frozenset[int] = frozenset()
        if in_buckets:
            self._values = [None if gradient is None else gradient.clone() for gradient in self._gradients]

    def stash(self) -> None:
        """Take them off their parameters, for the first pass."""
        for parameter in self._parameters:
            parameter.grad = None

    def note_used(self) -> None:
        """Have the second pass accumulate onto zeros where the first has given a gradient, and none is stashed."""
        used = (p for p in self._parameters if p.grad is not None and p.grad.layout is torch.strided)
        self._used = frozenset(map(id, used))

    def unstash(self) -> None:
        """Drop the first pass's gradients, and give the second pass copies of the earlier ones to accumulate onto."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            if value is not None:
                parameter.grad = value.clone()
            else:
                parameter.grad = torch.zeros_like(parameter) if id(parameter) in self._used else None

    def undo(self) -> None:
        """Put the gradients back as they were before the step."""
        for parameter, gradient, value in zip(self._parameters, self._gradients, self._values, strict=True):
            if gradient is not value and gradient is not None and value is not None:
                gradient.copy_(value)
            parameter.grad = gradient


class FirstGradients:
    """The first passes' gradients of one optimizer step, summed over micro-batches as the second passes' are."""

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._pending: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy the gradients that ``parameters`` have now, until the micro-batch counts."""
        self._pending = [(p, p.grad.clone()) for p in parameters if p.grad is not None]

    @torch.no_grad()
    def commit(self) -> None:
        """Add what was kept."""
        for parameter, gradient in self._pending:
            if parameter in self._sums:
                self._sums[parameter].add_(gradient)
            else:
                self._sums[parameter] = gradient
        self._pending = []

    def forget_pending(self) -> None:
        """Drop what was kept of a micro-batch that failed."""
        self._pending = []

    def take(self, *, copies: bool) -> dict[nn.Parameter, Tensor]:
        """The sums by parameter, with the last micro-batch's; they stay here too, for a step that fails is repeated.

        ``copies``: the caller writes to them.
        """
        sums = dict(self._sums)
        for parameter, gradient in self._pending:
            sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
        return {parameter: gradient.clone() for parameter, gradient in sums.items()} if copies else sums

    def clear(self) -> None:
        """Begin anew, after an optimizer step."""
        self._sums, self._pending = {}, []
