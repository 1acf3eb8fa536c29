"""The gradient that the optimizer gets, where a method makes it of both passes' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_sharp.ops.fsdp import local_shard


@dataclass(frozen=True)
class FinalGradient:
    """Gradients of one optimizer step, without the loss scale, before they are clipped.

    Args:
        parameters: Those with a gradient; ``parameter.grad`` is what the optimizer gets and may be changed in place.
        first: The first passes' gradients, averaged over the processes as the others are; empty unless the method
            keeps them.
        total: Sums a product of every tensor over the processes that hold pieces of it (FSDP).
    """

    parameters: Sequence[nn.Parameter]
    first: Mapping[nn.Parameter, Tensor]
    total: Callable[[Sequence[nn.Parameter], Sequence[Tensor]], Tensor]

    @property
    def gradients(self) -> list[Tensor]:
        """What the optimizer gets of each parameter, as memory of this process."""
        return [local_shard(p.grad) for p in self.parameters if p.grad is not None]

    def first_gradients(self) -> list[Tensor]:
        """Of each parameter, the first passes' gradient; zero where there was none."""
        return [
            local_shard(self.first[p]) if p in self.first else torch.zeros_like(g)
            for p, g in zip(self.parameters, self.gradients, strict=True)
        ]

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The inner product of two lists of tensors, one of each parameter, taken as vectors.

        Returns:
            Scalar of at least float32. No host synchronisation.
        """
        products = [torch.dot(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]
        return self.total(self.parameters, products)


def _wide(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
