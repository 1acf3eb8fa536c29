"""SAM and ASAM.

SAM (Foret et al. 2021, arXiv 2010.01412) minimises the largest loss within a ball of radius ``rho`` around the weights,
to first order::

    g  = grad L(w)
    e  = rho * g / (||g|| + eps)
    w <- base optimizer's step on grad L(w + e), taken at w

ASAM (Kwon et al. 2021, arXiv 2102.11600) measures the ball in units of each weight's own size, ``T = |w| + eta``::

    e  = rho * T^2 g / (||T g|| + eps)

ASAM's radius is larger than SAM's by a factor of about 10 (its paper, section 5: 0.5 to 2 against 0.05 to 0.1).
"""

from __future__ import annotations

from mmengine.registry import OPTIM_WRAPPERS

from mm_sharp.step.wrapper import TwoPassOptimWrapper


@OPTIM_WRAPPERS.register_module()
class SAMOptimWrapper(TwoPassOptimWrapper):
    """Sharpness-aware minimization as an MMEngine optimizer wrapper.

    Two forward-backward passes on the same batch, so a step costs twice the base optimizer's. It works with every
    model whose loss is its ``parse_losses`` of its forward.

    Args: those of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`; ``rho=0.05`` is the SAM paper's default,
        ``eta=0.01`` the ASAM paper's.

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
            optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='Adam', lr=5e-4))
    """
