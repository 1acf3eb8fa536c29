"""The settings of a step that all methods share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSettings:
    """What the arguments of a wrapper say about its steps; see :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Args:
        owner: The wrapper's class, for messages.
        rho: Radius of the perturbation.
        adaptive: ASAM's perturbation instead of SAM's.
        eta: ASAM's additive constant.
        eps: Added to the gradient norm.
        perturb_quantized: Whether the quantized weights are perturbed in quantized layers.
        sync_perturbation: Whether the perturbation follows the gradient averaged over all ranks.
        replay_rng: Whether both passes draw the same random numbers.
    """

    owner: str
    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01
    eps: float = 1e-12
    perturb_quantized: bool = False
    sync_perturbation: bool = False
    replay_rng: bool = True
