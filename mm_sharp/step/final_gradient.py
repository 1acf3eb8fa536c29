"""The gradient that the optimizer gets, where a method makes it of both passes' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.ops.finite import choose
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.gradients import inner_products


@dataclass(frozen=True)
class FinalGradient:
    """Gradients of one optimizer step, without the loss scale, before they are clipped."""

    # With a gradient, which is what the optimizer gets; change it in place. Sparse ones are left as they are.
    parameters: Sequence[nn.Parameter]
    # The first passes' gradients, averaged over the processes as the others are, and not to be written to; empty unless
    # the method keeps them.
    first: Mapping[nn.Parameter, Tensor]
    # Sums a product of every tensor over the processes that hold pieces of it (FSDP).
    total: Callable[[Sequence[nn.Parameter], Sequence[Tensor]], Tensor]
    # Scalar of bool, where the host does not know it: if it is False the gradients are zero, since what they were was
    # not finite. None where the optimizer would not step then.
    finite: Tensor | None = None

    @property
    def gradients(self) -> list[Tensor]:
        """What the optimizer gets of each parameter, as memory of this process."""
        return [local_shard(p.grad) for p in self.parameters if p.grad is not None]

    def first_gradients(self) -> list[Tensor]:
        """Of each parameter, the first passes' gradient; zero where there was none."""
        first = [self.first.get(parameter) for parameter in self.parameters]
        return [
            torch.zeros_like(ours) if theirs is None else local_shard(theirs)
            for ours, theirs in zip(self.gradients, first, strict=True)
        ]

    def first_and_difference(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each parameter g, and g' - g, where g' is what the optimizer gets so far.

        Where the first gradient is not finite, there was no perturbation: g' stands in for it, and the difference is 0.
        """
        ours, plain = self.gradients, self.first_gradients()
        apart = [mine - g for mine, g in zip(ours, plain, strict=True)]
        sound = self.all_finite(apart)
        return choose(sound, plain, lambda: ours), choose(sound, apart, lambda: list(map(torch.zeros_like, apart)))

    def all_finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """Whether ``tensors``, one of each parameter, are finite, and the final gradient was; scalar of bool."""
        sound = torch.isfinite(self.dot(tensors, tensors))
        return sound if self.finite is None else sound & self.finite.to(sound.device)

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The inner product of two lists of tensors, one of each parameter, taken as vectors.

        Returns:
            Scalar of at least float32. No host synchronisation.
        """
        return self.total(self.parameters, inner_products(left, right))

    def norm_of(self, tensors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The 2-norm of tensors by parameter, which may be others than these, taken as one vector; as :meth:`dot`."""
        values = [*tensors.values()]
        return self.total([*tensors], inner_products(values, values)).sqrt()


@torch.no_grad()
def move_beside(optimizer: Optimizer, beside: Mapping[nn.Parameter, Tensor]) -> None:
    """Subtract what a method has beside the optimizer's step, times the learning rate of each parameter's group."""
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if parameter in beside:
                local_shard(parameter).sub_(beside[parameter] * group['lr'])
