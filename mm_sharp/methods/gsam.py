"""GSAM: SAM that also narrows the gap between the loss at the perturbed weights and the loss at the weights.

GSAM (Zhuang et al., ICLR 2022, arXiv 2203.08065, algorithm 1): to lower the surrogate gap L(w + e) - L(w) without
raising L(w + e), the step goes against the part of the plain gradient that is orthogonal to SAM's::

    rho_t = rho_min + (rho - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    g     = grad L(w),  g' = grad L(w + e),  e = rho_t * g / ||g||
    g_o   = g - (g . g' / g' . g') g'
    the optimizer gets  g' - alpha * g_o

Ours: products are over all parameters together. The gradients are those of the whole optimizer step, averaged over
micro-batches and processes; the authors' PyTorch code decomposes each worker's gradient by itself. The learning rate
is that of no single parameter group, which ``paramwise_cfg`` may have multiplied, by 0 even. ``lr_max`` is by default
what a parameter scheduler takes for the initial one, or that at the start. rho_t stays between ``rho_min`` and
``rho``. The paper's variant that multiplies the perturbation by ``|w|`` is left out; ``adaptive=True`` is ASAM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_number
from mm_sharp.ops.perturbation import Direction
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class GSAMOptimWrapper(TwoPassOptimWrapper):
    """GSAM as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer. Where there are several parameter groups, the learning rate is what a parameter
            scheduler makes of the config's own ``lr``; without one, it is that of the group with the highest.
        rho: Radius of the perturbation at the highest learning rate.
        rho_min: Radius at the lowest one, in [0, ``rho``]; with ``rho_min=rho`` the radius is constant.
        alpha: Weight of the orthogonal part, >= 0; with 0 this is SAM with a scheduled radius.
        lr_max: The highest learning rate, > ``lr_min``; by default the optimizer's initial one.
        lr_min: The lowest learning rate, >= 0.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    changes_gradient: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        rho_min: float = 0.0,
        alpha: float = 0.4,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        super().__init__(optimizer, rho=rho, **kwargs)
        self.rho_min = check_number(name, 'rho_min', rho_min, high=self.rho, example='0.0')
        self.alpha = check_number(name, 'alpha', alpha, example='0.4')
        self.lr_min = check_number(name, 'lr_min', lr_min, example='0.0')
        if lr_max is not None:
            check_number(name, 'lr_max', lr_max, low=self.lr_min, low_open=True, example='5e-4')
        self.lr_max = lr_max
        self._first_lr = float(self._group()['lr'])

    @property
    def scheduled_rho(self) -> float:
        """The radius at the learning rate as it is now."""
        group = self._group()
        highest = self.lr_max if self.lr_max is not None else float(group.get('initial_lr', self._first_lr))
        share = (float(group['lr']) - self.lr_min) / (highest - self.lr_min) if highest > self.lr_min else 1.0
        return self.rho_min + (self.rho - self.rho_min) * min(max(share, 0.0), 1.0)

    def _group(self) -> Mapping[str, Any]:
        """The parameter group whose learning rate counts."""
        base: dict[str, Any] | None = self.base_param_settings  # MMEngine's, of no parameters
        if base is not None and 'initial_lr' in base:
            return base
        return max(self.optimizer.param_groups, key=lambda group: float(group.get('initial_lr', group['lr'])))

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Called by a Runner when the training begins, after it may have scaled the learning rate."""
        super().initialize_count_status(model, init_counts, max_counts)
        if init_counts == 0:
            self._first_lr = float(self._group()['lr'])

    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Direction:
        """SAM's, or ASAM's, at the scheduled radius."""
        return replace(super().direction(weights, gradients), rho=self.scheduled_rho)

    def final_gradient(self, gradient: FinalGradient) -> None:
        """g' - alpha * g_o."""
        if not gradient.first:  # there was no second pass, in a class of two methods
            return
        ours = gradient.gradients
        # g' - g has the same orthogonal part as -g, and is exactly zero where nothing was perturbed.
        _, apart = gradient.first_and_difference()
        along = gradient.dot(apart, ours) / gradient.dot(ours, ours).clamp(min=self.settings.eps**2)
        for mine, difference in zip(ours, apart, strict=True):
            mine.add_(difference - along.to(mine) * mine, alpha=self.alpha)

    def own_state(self) -> dict[str, Any]:
        """The learning rate at the start."""
        return {**super().own_state(), 'first_lr': self._first_lr}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`mm_sharp.step.method.Method.load_own_state`."""
        super().load_own_state(state)
        self._first_lr = state.get('first_lr', self._first_lr)

    def in_words(self, batch_size: int, length: TrainingLength, model: nn.Module | None) -> dict[str, str]:
        """See :meth:`mm_sharp.step.method.Method.in_words`."""
        return {'schedule': f'rho from {self.rho:g} to {self.rho_min:g}, with the learning rate'}

    def log_scalars(self) -> dict[str, float]:
        """The radius."""
        return {**super().log_scalars(), 'rho': self.scheduled_rho}
