"""The rise of one batch's loss at several radii, all at the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import UsageError
from mm_sharp.hooks.scale import Scale, scale_of
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@dataclass(frozen=True)
class BatchRises:
    """What was found on one batch.

    Args:
        loss: L(w).
        slope: The inner product of e and g over rho: what the loss rises by for each unit of rho, were it linear.
        rises: L(w + e) - L(w) at each radius.
        scale: Of the perturbation at the first radius, by part of the model; at the others it is in proportion.
    """

    loss: float
    slope: float
    rises: list[float]
    scale: Scale


class _MeasuredError(Exception):
    """Ends a step in which all was measured; the step then puts everything back, as after any error."""

    def __init__(self, rises: BatchRises | None) -> None:
        self.rises = rises


class RhoProbe(TwoPassOptimWrapper):
    """An optimizer wrapper that measures SAM's perturbation at a grid of radii, and never steps.

    Args:
        optimizer: Of the model; it is not stepped.
        rhos: The radii, each above 0.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.
    """

    def __init__(self, optimizer: Optimizer, rhos: Sequence[float], **kwargs: Any) -> None:
        super().__init__(optimizer, rho=rhos[0], **kwargs)
        self._rhos = rhos
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def measure(self, model: Any, batch: Any) -> BatchRises | None:
        """Measure one batch as it comes from the loader. The model is afterwards as it was, bit for bit.

        Returns:
            None if the gradient is not finite, or zero.

        Raises:
            UsageError: The model's ``train_step`` makes no step with the wrapper that it is given.
        """
        try:
            model.train_step(batch, self)
        except _MeasuredError as measured:
            return measured.rises
        finally:
            self._gradients = []
        raise UsageError(f'{type(model).__name__}: its train_step makes no step that could be measured')

    def perturbation_gradient(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], inverse_scale: Tensor | None
    ) -> None:
        """Keep the gradient, which the perturbation at the first radius is going to overwrite."""
        if not self._gradients:
            self._gradients = [(p, g.clone()) for p, g in zip(parameters, gradients, strict=True)]

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> NoReturn:
        """L(w + e) at each radius; ends the step."""
        if not self._gradients or not torch.isfinite(norm) or not norm:
            raise _MeasuredError(None)
        ascent, before, rises = self._two_pass.ascent, float(loss.detach()), []
        slope, scale = 0.0, None
        for rho in self._rhos:
            self.rho = rho
            for parameter, gradient in self._gradients:
                parameter.grad = gradient.clone()
            ascent.restore()
            ascent.perturb(self, loss.device)
            if scale is None:
                slope = self._inner_product() / rho
                sizes = ascent.sizes(loss.device)
                assert sizes is not None
                scale = scale_of(sizes, self._two_pass.parallel.module)
            rises.append(float(self.second_pass.loss_without_gradient(call)) - before)
        assert scale is not None
        raise _MeasuredError(BatchRises(before, slope, rises, scale))

    def _inner_product(self) -> float:
        """Of e, which :meth:`Ascent.perturb` leaves in the gradients' memory, and the gradient without loss scale."""
        products = [torch.sum(p.grad * g) for p, g in self._gradients if p.grad is not None]
        inverse = self.precision.inverse_scale()
        return sum(map(float, products)) * (1.0 if inverse is None else float(inverse))
