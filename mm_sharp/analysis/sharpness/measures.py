"""What is measured of an objective: eigenvalues and trace of the Hessian, rises within balls, and landscapes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mm_sharp.analysis.sharpness.objective import Objective

# ARPACK keeps so many Lanczos vectors, in float64; so many restarts may each take as many products.
_VECTORS, _RESTARTS = 20, 25
_TOGETHER = 5  # draws that share one first derivative


class Eigenvalues(NamedTuple):
    """The largest eigenvalues, largest first; fewer than asked for if they did not converge."""

    values: list[float]
    residuals: list[float]  # ||H v - lambda v|| of each
    tolerance: float  # ARPACK's, relative to the eigenvalue
    products: int  # with the matrix
    vectors: Tensor  # of unit length, (count, size), on the CPU


class Trace(NamedTuple):
    """An estimate of a trace."""

    value: float
    standard_error: float
    draws: int


def top_eigenvalues(objective: Objective, count: int, tolerance: float, seed: int) -> Eigenvalues:
    """The algebraically largest eigenvalues of the Hessian, less than its size, from a vector that the seed draws.

    ARPACK's implicitly restarted Lanczos method (``scipy.sparse.linalg.eigsh``) stops where its estimate of the
    residual falls below ``tolerance * |lambda|``. The residual itself is computed afterwards by one more product: for a
    symmetric H an eigenvalue lies within it.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size, products = objective.size, 0

    def multiply(vector: Any) -> Any:
        nonlocal products
        products += 1
        given = torch.from_numpy(np.array(vector, np.float64).reshape(-1)).to(objective.device)
        return objective.hessian_times([given])[0].cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(size)
    if not multiply(start).any():  # linear in the weights: ARPACK would find no direction to go
        return Eigenvalues([0.0] * count, [0.0] * count, tolerance, products, torch.eye(count, size).double())
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    kept = min(size, max(_VECTORS, 2 * count + 1))
    try:
        values, vectors = eigsh(operator, count, which='LA', v0=start, tol=tolerance, ncv=kept, maxiter=_RESTARTS)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(values)[::-1]
    residuals = [float(np.linalg.norm(multiply(vectors[:, i]) - values[i] * vectors[:, i])) for i in order]
    found = torch.from_numpy(np.ascontiguousarray(vectors.T[order]))
    return Eigenvalues([float(values[i]) for i in order], residuals, tolerance, products, found)


def hutchinson(objective: Objective, draws: int, seed: int) -> Trace:
    """Estimate the Hessian's trace by at least 2 draws z of random signs: ``E[z' H z] = tr H`` (Hutchinson 1990)."""
    generator = torch.Generator().manual_seed(seed)
    forms: list[float] = []
    while len(forms) < draws:
        rows = (min(_TOGETHER, draws - len(forms)), objective.size)
        signs = list((2.0 * torch.randint(0, 2, rows, generator=generator) - 1).double().to(objective.device))
        forms += [float(vector @ image) for vector, image in zip(signs, objective.hessian_times(signs), strict=True)]
    return Trace(float(np.mean(forms)), float(np.std(forms, ddof=1)) / math.sqrt(draws), draws)


class BallSharpness(NamedTuple):
    """Rises of the loss within a ball: one step ahead (may be negative), and the largest found (None: no ascent)."""

    rho: float
    one_step: float
    ascent: float | None
    steps: int


def ball_sharpness(objective: Objective, loss: float, gradient: Tensor, rho: float, steps: int) -> BallSharpness:
    """Rises over L(w), whose ``loss`` and ``gradient`` g are given: lower bounds of what SAM minimizes.

    That is ``max_{||e|| <= rho} L(w + e)`` (Foret et al. 2021, arXiv 2010.01412). One step: ``L(w + rho g / ||g||)``.
    Ascent: the largest among that point, w itself and those of a projected gradient ascent of so many steps from there,
    ``e <- e + rho g(w + e) / ||g(w + e)||``, drawn back to the length rho where it is longer. A rise that is not finite
    means that the loss is not, at a point of the ball.
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
    norm = float(vector.norm())
    return vector * (length / norm) if norm > 0 else torch.zeros_like(vector)


def filter_direction(model: nn.Module, parameters: Iterable[nn.Parameter], seed: int, number: int = 0) -> Tensor:
    """A random direction for a model's parameters, flat, float64, on its device; numbers 0 and 1 are independent.

    Li et al. 2018 (arXiv 1712.09913): independent standard normal numbers, rescaled so that each filter has the norm of
    the weights' filter, ``d_f <- d_f ||w_f|| / ||d_f||``; then ``L(w + t d)`` does not depend on how large the weights
    before a BatchNorm are. Zero for parameters of one dimension, as in the authors' code. Ours: the numbers depend on
    the seed and the parameter's name only, so that models which differ in some layers share the others' directions.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {id(module.weight): module.groups for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    pieces = []
    for parameter in parameters:
        weights, name = parameter.detach().double().cpu(), names[id(parameter)]
        generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {number} {name}'.encode()))
        direction = torch.zeros_like(weights)
        if weights.ndim > 1:
            direction.normal_(generator=generator)
            norms = [filter_norms(tensor, groups.get(id(parameter))) for tensor in (weights, direction)]
            direction *= norms[0] / norms[1].clamp_min(1e-300)
        pieces.append(direction.flatten())
    return torch.cat(pieces).to(next(model.parameters()).device)


def filter_norms(weights: Tensor, transposed_groups: int | None = None) -> Tensor:
    """The norm of the filter, which makes one output channel, that each weight belongs to; shaped like ``weights``.

    These are (out, in / groups, ...), or (in, out / groups, ...) of a transposed convolution, whose groups are given.
    """
    if transposed_groups is None:
        norms: Tensor = torch.linalg.vector_norm(weights.flatten(1), dim=1)
        return norms.reshape(-1, *[1] * (weights.ndim - 1)).expand_as(weights)
    # The output channels of group g are made by the g-th part of the input channels.
    parts = weights.reshape(transposed_groups, -1, *weights.shape[1:])
    others = [dim for dim in range(parts.ndim) if dim not in (0, 2)]
    return parts.pow(2).sum(others, keepdim=True).sqrt().expand_as(parts).reshape(weights.shape)


def line(objective: Objective, direction: Tensor, places: Sequence[float], start: Tensor | float = 0.0) -> list[float]:
    """L(w + start + t d) at each t of ``places``; nan or infinite where it is."""
    return [objective.loss_at(start + place * direction) for place in places]


def plane(objective: Objective, directions: Sequence[Tensor], places: Sequence[float]) -> list[list[float]]:
    """L(w + s d_0 + t d_1): a row for each t of ``places``, in it a value for each s."""
    return [line(objective, directions[0], places, t * directions[1]) for t in places]
