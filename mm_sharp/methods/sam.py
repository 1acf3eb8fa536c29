"""SAM (Foret et al. 2021, arXiv 2010.01412) and ASAM (Kwon et al. 2021, arXiv 2102.11600).

SAM minimises the largest loss within a ball of radius ``rho`` around the weights, to first order; ASAM measures the
ball in units of each weight's own size: :mod:`mm_sharp.ops.perturbation` has the equations. ASAM's radius is larger
than SAM's by a factor of about 10 (its paper, section 5: 0.5 to 2 against 0.05 to 0.1).

With ``interval=n``, one optimizer step in n is a step of SAM (or ASAM), and the others are the base optimizer's. It is
a practice of libraries (Composer's SAM has an argument of this name), and in neither paper. With accumulated gradients,
all micro-batches of an optimizer step are of one kind.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import OPTIM_WRAPPERS
from torch.optim import Optimizer

from mm_sharp.errors import check_positive_int
from mm_sharp.step.method import Cost, Passes
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class SAMOptimWrapper(TwoPassOptimWrapper):
    """Sharpness-aware minimization as an MMEngine optimizer wrapper.

    Two forward-backward passes on the same batch, so a step costs twice the base optimizer's. It works with every
    model whose loss is its ``parse_losses`` of its forward.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation; 0.05 is the SAM paper's default.
        interval: One optimizer step in so many is SAM's, the others are the base optimizer's; with 1 all are SAM's.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`; ``eta=0.01`` is the ASAM
            paper's default.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.

    Example:
        >>> import torch
        >>> from mm_sharp import SAMOptimWrapper
        >>> model = torch.nn.Linear(3, 1)
        >>> wrapper = SAMOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
        >>> with wrapper.optim_context(model):
        ...     loss = model(torch.ones(2, 3)).mean()
        >>> wrapper.update_params(loss)
        >>> bool(wrapper.last_step.perturbed_loss > wrapper.last_step.loss)
        True

        In a config, with everything else as it was::

            custom_imports = dict(imports=['mm_sharp'])
            optim_wrapper = dict(type='SAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights')
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, interval: int = 1, **kwargs: Any) -> None:
        self.interval = check_positive_int(type(self).__name__, 'interval', interval, example='5')
        super().__init__(optimizer, rho=rho, **kwargs)

    def passes(self) -> Passes:
        """Both in the first of ``interval`` steps."""
        return Passes.BOTH if self.optimizer_steps % self.interval == 0 else Passes.FIRST

    @property
    def alternates(self) -> bool:
        """Unless ``interval`` is 1."""
        return self.interval > 1

    @classmethod
    def theoretical_cost(cls, batch_size: int, interval: int = 1, **settings: Any) -> Cost:
        """1 + 1/interval."""
        return Cost(1.0 if interval > 1 else 2.0, 1.0 + 1.0 / interval, interval)
