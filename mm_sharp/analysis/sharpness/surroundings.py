"""The loss around the weights: within a ball, which is what SAM minimizes, and along random directions.

**Balls.** SAM (Foret et al. 2021, arXiv 2010.01412) trains on ``max_{||e|| <= rho} L(w + e)``, and takes for the
maximum the value one step along the gradient ahead. Two numbers, both rises over L(w) and lower bounds of the maximum:

    one step    L(w + rho g / ||g||) - L(w), g the gradient over all samples
    ascent      the largest rise among that point, w itself and those of a projected gradient ascent from there:
                e <- e + rho g(w + e) / ||g(w + e)||, drawn back to the length rho where it is longer

**Landscapes.** Li et al. 2018 (arXiv 1712.09913): a direction d of independent standard normal numbers is rescaled so
that each of its filters has the norm of the weights' filter, ``d_f <- d_f ||w_f|| / ||d_f||``; then ``L(w + t d)`` does
not depend on how large the weights of a layer before a BatchNorm are, and curves of different networks can be compared.
As the authors' code does by default, d is zero for parameters of one dimension. Filters are the slices of a parameter
that make one output channel each: along its first dimension, along the second of a transposed convolution. (The
authors' code takes the first there, too.) Ours: a parameter's random numbers depend on the seed and its name only, so
that models which differ in some layers have the same direction in the others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mm_sharp.analysis.sharpness.objective import Objective


class BallSharpness(NamedTuple):
    """Rises of the loss within a ball: one step ahead (may be negative), and the largest found (None: no ascent)."""

    rho: float
    one_step: float
    ascent: float | None
    steps: int


def ball_sharpness(objective: Objective, loss: float, gradient: Tensor, rho: float, steps: int) -> BallSharpness:
    """Measure rises over L(w), whose ``loss`` and ``gradient`` are given, with an ascent of so many steps, or none.

    A rise that is not finite means that the loss is not, at a point of the ball.
    """
    offset = _of_length(gradient, rho)
    rises = []
    for _ in range(steps):
        with objective.moved(offset):
            value, slope = objective.loss_and_gradient()
        rises.append(value - loss)
        if not math.isfinite(value) or not bool(torch.isfinite(slope).all()):
            break
        offset = offset + _of_length(slope, rho)
        if float(offset.norm()) > rho:
            offset = _of_length(offset, rho)
    rises.append(objective.loss_at(offset) - loss)
    largest = math.nan if any(math.isnan(rise) for rise in rises) else max(0.0, *rises)
    return BallSharpness(rho, rises[0], largest if steps else None, steps)


def _of_length(vector: Tensor, length: float) -> Tensor:
    """In the direction of ``vector``; zero for a vector of zeros."""
    norm = float(vector.norm())
    return vector * (length / norm) if norm > 0 else torch.zeros_like(vector)


def filter_direction(model: nn.Module, parameters: Iterable[nn.Parameter], seed: int, number: int = 0) -> Tensor:
    """A random direction for a model's parameters, flat, float64, on its device; numbers 0 and 1 are independent."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {id(module.weight): module.groups for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    pieces = []
    for parameter in parameters:
        weights = parameter.detach().double().cpu()
        if weights.ndim < 2:
            pieces.append(torch.zeros(weights.numel(), dtype=torch.float64))
            continue
        key = zlib.crc32(f'{seed} {number} {names[id(parameter)]}'.encode())
        direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
        norms = [filter_norms(tensor, groups.get(id(parameter))) for tensor in (weights, direction)]
        pieces.append((direction * (norms[0] / norms[1].clamp_min(1e-300))).flatten())
    return torch.cat(pieces).to(next(model.parameters()).device)


def filter_norms(weights: Tensor, transposed_groups: int | None = None) -> Tensor:
    """The norm of the filter that each weight belongs to, in the shape of ``weights``.

    Args:
        weights: (out, in / groups, ...), or (in, out / groups, ...) of a transposed convolution.
        transposed_groups: A transposed convolution's groups; None for other layers.
    """
    if transposed_groups is None:
        norms: Tensor = torch.linalg.vector_norm(weights.flatten(1), dim=1)
        return norms.reshape(-1, *[1] * (weights.ndim - 1)).expand_as(weights)
    # The output channels of group g are made by the g-th part of the input channels.
    parts = weights.reshape(transposed_groups, -1, *weights.shape[1:])
    others = [dim for dim in range(parts.ndim) if dim not in (0, 2)]
    return parts.pow(2).sum(others, keepdim=True).sqrt().expand_as(parts).reshape(weights.shape)


def line(objective: Objective, direction: Tensor, places: Sequence[float]) -> list[float]:
    """L(w + t d) at each t of ``places``; nan or infinite where it is."""
    return [objective.loss_at(place * direction) for place in places]


def plane(objective: Objective, directions: Sequence[Tensor], places: Sequence[float]) -> list[list[float]]:
    """L(w + s d_0 + t d_1): a row for each t of ``places``, in it a value for each s."""
    first, second = directions
    return [[objective.loss_at(s * first + t * second) for s in places] for t in places]
