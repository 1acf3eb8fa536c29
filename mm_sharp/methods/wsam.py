"""WSAM: sharpness as a weighted regularization term, apart from the base optimizer.

WSAM (Yue et al., KDD 2023, arXiv 2305.15817) weights the sharpness L(w + e) - L(w) by ``k = gamma / (1 - gamma)``; with
``gamma=0.5`` its loss is SAM's. In its main form, the sharpness term does not pass through the base optimizer, whose
momentum and preconditioner would change it (as AdamW does with weight decay)::

    g   = grad L(w),  g' = grad L(w + e),  e = rho * g / ||g||
    w  <- base optimizer's step on g, taken at w
    w  <- w - lr * k * (g' - g)

With ``decouple=False`` the base optimizer gets ``g + k * (g' - g)``.

``clip_grad`` clips g and g' each by itself, as the authors' code does; with ``decouple=False`` the sum. Ours: g and g'
are those of the whole optimizer step, averaged over micro-batches and processes. Where one of them is not finite there
is no sharpness term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_bool, check_number
from mm_sharp.ops.finite import choose
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class WSAMOptimWrapper(TwoPassOptimWrapper):
    """WSAM as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation.
        gamma: Weight of the sharpness, in [0, 1): its factor is gamma / (1 - gamma). 0 is the base optimizer, 0.9 the
            default of the authors' code.
        decouple: Whether the sharpness term is added to the weights beside the base optimizer's step.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    changes_gradient: ClassVar[bool] = True

    def __init__(
        self, optimizer: Optimizer, rho: float = 0.05, gamma: float = 0.9, decouple: bool = True, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        self.gamma = check_number(name, 'gamma', gamma, high=1.0, high_open=True, example='0.9')
        self.decouple = check_bool(name, 'decouple', decouple)
        super().__init__(optimizer, rho=rho, **kwargs)
        # Of this step: g' - g of each parameter, and g' after clipping, if it is clipped.
        self._beside: tuple[FinalGradient, Sequence[Tensor], list[Tensor] | None] | None = None

    @property
    def weight(self) -> float:
        """Factor of the sharpness term."""
        return self.gamma / (1.0 - self.gamma)

    def final_gradient(self, gradient: FinalGradient) -> None:
        """g, with the sharpness term or without it."""
        self._beside = None
        if not gradient.first:  # there was no second pass, in a class of two methods
            return
        plain, apart = gradient.first_and_difference()
        clipped = None
        if self.decouple and self.clip_grad_kwargs:
            self._clip_grad()  # g'
            clipped = [mine.clone() for mine in gradient.gradients]
        for mine, g, difference in zip(gradient.gradients, plain, apart, strict=True):
            mine.copy_(g)
            if not self.decouple:
                mine.add_(difference, alpha=self.weight)
        if self.decouple:
            self._beside = gradient, apart, clipped

    def beside_step(self) -> Mapping[nn.Parameter, Tensor]:
        """k * (g' - g), both clipped."""
        if self._beside is None:
            return {}
        (gradient, apart, clipped), self._beside = self._beside, None
        if clipped is not None:
            again = [second - g for second, g in zip(clipped, gradient.gradients, strict=True)]
            sound = gradient.all_finite(again)  # else the loss scaler leaves the step out
            apart = choose(sound, again, lambda: list(map(torch.zeros_like, again)))
        return dict(zip(gradient.parameters, [self.weight * difference for difference in apart], strict=True))
