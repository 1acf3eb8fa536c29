"""Friendly SAM: SAM's perturbation without the part of the gradient that all batches share.

Friendly SAM, F-SAM (Li et al., CVPR 2024, arXiv 2403.12350), estimates the whole data set's gradient by an
exponential average of the batches' gradients, and perturbs along what is particular to the batch::

    g   = grad L(w)
    m  <- lmbda * m + (1 - lmbda) * g
    e   = rho * d / ||d||,  d = g - sigma * m
    w  <- base optimizer's step on grad L(w + e), taken at w

m is updated with the gradient itself, as in the paper. (A widely used implementation feeds the reduced gradient ``d``
back into its average.) It starts at zero. The authors' code subtracts m as it was before g entered it, and starts it
with the first g; with ``sigma=1`` that gives the same direction, up to what m started with.

m is one for all processes and micro-batches: when an optimizer step is made, it takes up the first passes' gradient,
averaged over both. Each micro-batch of each process is perturbed along its own ``g - sigma * m``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_number
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class FriendlySAMOptimWrapper(TwoPassOptimWrapper):
    """Friendly SAM as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation.
        sigma: How much of the average is taken off the gradient, >= 0; 0 is SAM, 1 the paper's value.
        lmbda: Weight of the past in the average, in (0, 1); 0.9 is the default of the authors' code.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    changes_gradient: ClassVar[bool] = True  # it does not, but gets the first passes' gradients by this
    keeps: ClassVar[bool] = True
    hands_on: ClassVar[frozenset[str]] = frozenset({'perturbation_gradient', 'final_gradient'})

    def __init__(
        self, optimizer: Optimizer, rho: float = 0.05, sigma: float = 1.0, lmbda: float = 0.9, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        self.sigma = check_number(name, 'sigma', sigma, example='1.0')
        self.lmbda = check_number(name, 'lmbda', lmbda, high=1.0, low_open=True, high_open=True, example='0.9')
        super().__init__(optimizer, rho=rho, **kwargs)

    def perturbation_gradient(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], inverse_scale: Tensor | None
    ) -> None:
        """g - sigma * m, with the micro-batch's g in m already."""
        share = 1.0 - self.sigma * (1.0 - self.lmbda)
        past: float | Tensor = self.sigma * self.lmbda
        if inverse_scale is not None:
            past = past / inverse_scale
        for gradient, average in zip(gradients, self.kept_of(parameters), strict=True):
            factor = past.to(gradient) if isinstance(past, Tensor) else past
            gradient.mul_(share).sub_(average.to(gradient) * factor)
        super().perturbation_gradient(parameters, gradients, inverse_scale)

    def final_gradient(self, gradient: FinalGradient) -> None:
        """Take up the optimizer step's g in m."""
        plain = gradient.first_gradients() if gradient.first else gradient.gradients  # of a step's only pass
        averages = {
            parameter: self.lmbda * average + (1.0 - self.lmbda) * g
            for parameter, average, g in zip(gradient.parameters, self.kept_of(gradient.parameters), plain, strict=True)
        }
        # The gradient of all others is zero in this step.
        others = {
            parameter: self.lmbda * average for parameter, average in self.kept.items() if parameter not in averages
        }
        averages.update(others)
        self.keep([*averages], [*averages.values()], gradient.all_finite(plain))
        super().final_gradient(gradient)
