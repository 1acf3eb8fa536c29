"""LookSAM: SAM's second pass in one step of k, its direction in the others.

LookSAM (Liu et al., CVPR 2022, arXiv 2203.02714, algorithm 1): the part of SAM's gradient that is orthogonal to the
plain one points to flatter regions and changes slowly, so that it can be used again::

    in one step of k    g   = grad L(w),  g' = grad L(w + e)      the optimizer gets g'
                        g_v = g' - (g' . g / g . g) g
    in the others       the optimizer gets  g + alpha * (||g|| / ||g_v||) * g_v

Norms and products are over all parameters together, as in the paper (popular implementations take them tensor by
tensor). With accumulated gradients, g and g' are those of the whole optimizer step.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmengine.registry import OPTIM_WRAPPERS
from torch.optim import Optimizer

from mm_sharp.errors import check_number, check_positive_int
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.method import Cost, Passes
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class LookSAMOptimWrapper(TwoPassOptimWrapper):
    """LookSAM as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation.
        k: One optimizer step in so many has a second pass; with 1 all have, which is SAM.
        alpha: Weight of the kept direction in the other steps, >= 0, relative to the gradient's norm.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    changes_gradient: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, k: int = 5, alpha: float = 0.7, **kwargs: Any) -> None:
        self.k = check_positive_int(type(self).__name__, 'k', k, example='5')
        self.alpha = check_number(type(self).__name__, 'alpha', alpha, example='0.7')
        super().__init__(optimizer, rho=rho, **kwargs)

    def passes(self) -> Passes:
        """Both in the first of k steps."""
        return Passes.BOTH if self.optimizer_steps % self.k == 0 else Passes.FIRST

    @property
    def alternates(self) -> bool:
        """Unless ``k`` is 1."""
        return self.k > 1

    def final_gradient(self, gradient: FinalGradient) -> None:
        """Keep g_v, or add it."""
        ours = gradient.gradients
        if gradient.first:
            plain = gradient.first_gradients()
            along = gradient.dot(ours, plain) / gradient.dot(plain, plain).clamp(min=self.settings.eps**2)
            across = [a - along.to(a) * b for a, b in zip(ours, plain, strict=True)]
            self.keep(gradient.parameters, across, gradient.all_finite(across))
            return
        kept = self.kept_of(gradient.parameters)
        norm = gradient.norm_of(self.kept)
        factor = self.alpha * gradient.dot(ours, ours).sqrt() / (norm + self.settings.eps)
        for mine, direction in zip(ours, kept, strict=True):
            mine.add_(factor.to(mine) * direction)

    @classmethod
    def theoretical_cost(cls, batch_size: int, k: int = 5, **settings: Any) -> Cost:
        """1 + 1/k."""
        return Cost(1.0, 1.0 + 1.0 / k, k)
