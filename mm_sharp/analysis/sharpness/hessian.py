"""Largest eigenvalues and trace of the Hessian, from its products with vectors.

Eigenvalues: ARPACK's implicitly restarted Lanczos method (``scipy.sparse.linalg.eigsh``, ``which='LA'``), which stops
where its estimate of the residual falls below ``tolerance * |lambda|``. The residual itself, ``||H v - lambda v||``, is
computed afterwards by one more product: for a symmetric H an eigenvalue lies within it. Trace (Hutchinson 1990): with
independent z of random signs, ``E[z' H z] = tr H``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_sharp.analysis.sharpness.objective import Objective

# Lanczos vectors are kept by ARPACK in float64; restarts, each of which may take as many products.
_VECTORS, _RESTARTS = 20, 25
# Draws that share one first derivative.
_TOGETHER = 5


class Eigenvalues(NamedTuple):
    """The largest eigenvalues of a symmetric matrix, largest first; fewer than asked for if they did not converge."""

    values: list[float]
    residuals: list[float]  # ||H v - lambda v|| of each
    tolerance: float  # ARPACK's, relative to the eigenvalue
    products: int  # with the matrix
    vectors: Tensor  # of unit length, (count, size), on the CPU


class Trace(NamedTuple):
    """An estimate of a trace: mean over the draws, and its standard error."""

    value: float
    standard_error: float
    draws: int


def top_eigenvalues(objective: Objective, count: int, tolerance: float, seed: int) -> Eigenvalues:
    """The algebraically largest eigenvalues, less than the matrix' size; the seed is of the vector to start from."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size, products = objective.size, 0

    def multiply(vector: Any) -> Any:
        nonlocal products
        products += 1
        (result,) = objective.hessian_times(
            [torch.from_numpy(np.array(vector, np.float64).reshape(-1)).to(objective.device)]
        )
        return result.cpu().numpy()

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
    """Estimate a trace by at least 2 draws."""
    generator = torch.Generator().manual_seed(seed)
    forms: list[float] = []
    while len(forms) < draws:
        signs = [
            (2.0 * torch.randint(0, 2, (objective.size,), generator=generator) - 1).double().to(objective.device)
            for _ in range(min(_TOGETHER, draws - len(forms)))
        ]
        forms += [float(vector @ image) for vector, image in zip(signs, objective.hessian_times(signs), strict=True)]
    return Trace(float(np.mean(forms)), float(np.std(forms, ddof=1)) / math.sqrt(draws), draws)
