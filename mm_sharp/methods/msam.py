"""Momentum SAM: one pass, at weights that are perturbed along the optimizer's momentum.

Momentum SAM, MSAM (Becker et al., arXiv 2401.12033), takes the momentum, which is there anyway, in place
of the gradient that SAM's first pass computes. A step costs what the base optimizer's costs::

    e   = -rho * v / ||v||
    g   = grad L(w + e)
    w  <- base optimizer's step on g, taken at w, which makes a new v of v and g

The sign is the paper's: the perturbation goes where the next step goes, as in Nesterov's method, not up the gradient.
v is SGD's momentum, or Adam's average of the gradients (not divided by the root of the second moments), as in the
authors' code. In the first step there is none yet, and no perturbation.

The authors' code keeps the weights perturbed from step to step, which saves copies. Here they are w outside of the two
passes, bit for bit, so that validation, checkpoints and averages of the weights need no care. Running statistics, such
as BatchNorm's, are those of the only forward, at w + e. With accumulated gradients, all micro-batches have the same v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import UserError
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.step.method import Cost, Passes
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class MSAMOptimWrapper(TwoPassOptimWrapper):
    """Momentum SAM as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer, with momentum: SGD with ``momentum``, Adam, AdamW and their like.
        rho: Radius of the perturbation; 0.3 is the default of the authors' code for SGD. They train with up to 3.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`. ``sync_perturbation`` changes
            nothing: the momentum is the same in all processes.

    Raises:
        ValueError: An argument is out of range, the optimizer has no momentum, or ``perturb_quantized`` is on.
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.3, **kwargs: Any) -> None:
        name = type(self).__name__
        super().__init__(optimizer, rho=rho, **kwargs)
        if not any(group.get('momentum') or (group.get('betas') or (0.0,))[0] for group in optimizer.param_groups):
            raise UserError(
                f'{name}: optimizer={type(optimizer).__name__} is not allowed: it has no momentum to perturb along. '
                f"Write for example: optim_wrapper = dict(type='{name}', optimizer=dict(type='SGD', lr=0.01, "
                'momentum=0.9), ...)'
            )
        if self.settings.perturb_quantized:
            raise UserError(
                f'{name}: perturb_quantized=True is not allowed: there is no gradient of the quantized weights before '
                f"the only pass. Take it out: optim_wrapper = dict(type='{name}', ...)"
            )

    def passes(self) -> Passes:
        """One, at the perturbed weights."""
        return Passes.PERTURBED

    def perturb_along(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """-v; None where there is none yet."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        momenta = [state.get('momentum_buffer', state.get('exp_avg')) for state in states]
        known = [local_shard(momentum) for momentum in momenta if momentum is not None]
        # Sparse ones are refused by name later on, for which older versions of torch have no such operation.
        dense = known and all(momentum.layout is torch.strided for momentum in known)
        opposite = iter(torch._foreach_neg(known) if dense else known)
        return [None if momentum is None else next(opposite) for momentum in momenta]

    def in_words(self, batch_size: int, length: TrainingLength, model: nn.Module | None) -> dict[str, str]:
        """See :meth:`mm_sharp.step.method.Method.in_words`."""
        return {'samples': f'all {batch_size} of a batch, in the only pass, at w + e'}

    @classmethod
    def theoretical_cost(cls, batch_size: int, **settings: Any) -> Cost:
        """The base optimizer's."""
        return Cost(1.0, 1.0)
