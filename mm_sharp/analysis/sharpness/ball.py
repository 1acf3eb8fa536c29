"""How far the loss rises within a distance rho of the weights: what SAM minimizes (ours).

SAM (Foret et al. 2021, arXiv 2010.01412) trains on ``max_{||e|| <= rho} L(w + e)``, and takes for the maximum the value
one step along the gradient ahead. Two numbers for each rho, both rises over L(w):

    one step    L(w + rho g / ||g||) - L(w), g the gradient over all samples
    ascent      the largest rise among that point, w itself and those of a projected gradient ascent from there:
                e <- e + rho g(w + e) / ||g(w + e)||, drawn back to the length rho where it is longer

Both are values of the loss at points of the ball: lower bounds of the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_sharp.analysis.sharpness.objective import Objective


@dataclass(frozen=True)
class BallSharpness:
    """Rises of the loss within a ball.

    Args:
        rho: Its radius, in the units of the weights' 2-norm.
        one_step: One step along the gradient ahead; may be negative.
        ascent: The largest found, at least 0; None without an ascent.
        steps: Of the ascent.
    """

    rho: float
    one_step: float
    ascent: float | None
    steps: int


def ball_sharpness(
    objective: Objective,
    loss: float,
    gradient: Tensor,
    rho: float,
    steps: int,
    tick: Callable[[], object] = lambda: None,
) -> BallSharpness:
    """Measure the rise of the loss within a ball.

    Args:
        objective: The loss, around w.
        loss: L(w).
        gradient: Its gradient at w.
        rho: Radius of the ball, above 0.
        steps: Of the ascent; 0 for none.
        tick: Called after each evaluation of the loss, ``steps + 1`` times.

    Returns:
        Rises; one that is not finite means that the loss is not, at a point of the ball.
    """
    offset = _of_length(gradient, rho)
    rises = []
    for _ in range(steps):
        with objective.moved(offset):
            value, slope = objective.loss_and_gradient()
        rises.append(value - loss)
        tick()
        if not math.isfinite(value) or not bool(torch.isfinite(slope).all()):
            break
        offset = offset + _of_length(slope, rho)
        if float(offset.norm()) > rho:
            offset = _of_length(offset, rho)
    rises.append(objective.loss_at(offset) - loss)
    tick()
    largest = math.nan if any(math.isnan(rise) for rise in rises) else max(0.0, *rises)
    return BallSharpness(rho, rises[0], largest if steps else None, steps)


def _of_length(vector: Tensor, length: float) -> Tensor:
    """In the direction of ``vector``; zero for a vector of zeros."""
    norm = float(vector.norm())
    return vector * (length / norm) if norm > 0 else torch.zeros_like(vector)
