"""The loss along random directions that are normalised by filters.

Li et al. 2018 (arXiv 1712.09913): a direction d of independent standard normal numbers is rescaled so that each of its
filters has the norm of the weights' filter, ``d_f <- d_f ||w_f|| / ||d_f||``; then ``L(w + t d)`` does not depend on
how large the weights of a layer before a BatchNorm are, and curves of different networks can be compared. As the
authors' code does by default, d is zero for parameters of one dimension: biases and norm layers.

Filters are the slices of a parameter that make one output channel each: along its first dimension, along the second of
a transposed convolution. (The authors' code takes the first there, too.)

Ours: a parameter's random numbers depend on the seed and its name only, so that models which differ in some layers have
the same direction in the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mm_sharp.analysis.sharpness.objective import Objective


def filter_direction(model: nn.Module, parameters: Iterable[nn.Parameter], seed: int, number: int = 0) -> Tensor:
    """A random direction whose filters have the norms of the weights' filters.

    Args:
        model: Has the parameters.
        parameters: Those that the direction moves.
        seed: With each parameter's name, of its random numbers.
        number: Of the direction: 0 and 1 are independent.

    Returns:
        Flat, float64, on the parameters' device.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {id(module.weight): module.groups for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    pieces = []
    for parameter in parameters:
        weights = parameter.detach().double().cpu()
        if weights.ndim < 2:
            pieces.append(torch.zeros(weights.numel(), dtype=torch.float64))
            continue
        key = zlib.crc32(f'{seed} {number} {names[id(parameter)]}'.encode())
        generator = torch.Generator().manual_seed(key)
        direction = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        norms = [filter_norms(tensor, groups.get(id(parameter))) for tensor in (weights, direction)]
        pieces.append((direction * (norms[0] / norms[1].clamp_min(1e-300))).flatten())
    return torch.cat(pieces).to(next(model.parameters()).device)


def filter_norms(weights: Tensor, transposed_groups: int | None = None) -> Tensor:
    """The norm of the filter that each weight belongs to.

    Args:
        weights: Of a layer, at least two dimensions: (out, in / groups, ...), or (in, out / groups, ...) of a
            transposed convolution.
        transposed_groups: A transposed convolution's groups; None for other layers.

    Returns:
        In the shape of ``weights``.
    """
    if transposed_groups is None:
        norms: Tensor = torch.linalg.vector_norm(weights.flatten(1), dim=1)
        return norms.reshape(-1, *[1] * (weights.ndim - 1)).expand_as(weights)
    # The output channels of group g are made by the g-th part of the input channels.
    parts = weights.reshape(transposed_groups, -1, *weights.shape[1:])
    others = [dim for dim in range(parts.ndim) if dim not in (0, 2)]
    return parts.pow(2).sum(others, keepdim=True).sqrt().expand_as(parts).reshape(weights.shape)


def line(
    objective: Objective, direction: Tensor, places: Sequence[float], tick: Callable[[], object] = lambda: None
) -> list[float]:
    """L(w + t d) at each t of ``places``; nan or infinite where it is."""
    values = []
    for place in places:
        values.append(objective.loss_at(place * direction))
        tick()
    return values


def plane(
    objective: Objective,
    directions: tuple[Tensor, Tensor],
    places: Sequence[float],
    tick: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """L(w + s d_0 + t d_1): a row for each t of ``places``, in it a value for each s."""
    return [
        [value for s in places for value in line(objective, s * directions[0] + t * directions[1], [1.0], tick)]
        for t in places
    ]
