"""Largest eigenvalues and trace of the Hessian, from its products with vectors (ours).

Eigenvalues: the implicitly restarted Lanczos method of ARPACK (``scipy.sparse.linalg.eigsh``, ``which='LA'``), which
stops where its estimate of the residual falls below ``tolerance * |lambda|``. The residual itself, ``||H v - lambda
v||`` with ``||v|| = 1``, is computed afterwards by one more product: for a symmetric H an eigenvalue lies within it.

Trace (Hutchinson 1990): with independent z of random signs, ``E[z' H z] = tr H``; the standard error is that of the
mean of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Product = Callable[[Sequence[Tensor]], list[Tensor]]
# Lanczos vectors are kept by ARPACK in float64; restarts, each of which may take as many products.
_VECTORS, _RESTARTS = 20, 25
# Draws that share one first derivative.
_TOGETHER = 5


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of a symmetric matrix.

    Args:
        values: Largest first; fewer than were asked for where the iteration did not converge.
        residuals: ``||H v - lambda v||`` of each.
        tolerance: ARPACK's, relative to the eigenvalue.
        products: Products with the matrix.
        vectors: Of unit length, (count, size), on the CPU.
    """

    values: list[float]
    residuals: list[float]
    tolerance: float
    products: int
    vectors: Tensor


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    Args:
        value: Mean over the draws.
        standard_error: Of the mean.
        draws: How many.
    """

    value: float
    standard_error: float
    draws: int


def top_eigenvalues(
    product: Product,
    size: int,
    count: int,
    tolerance: float,
    seed: int,
    device: torch.device | str = 'cpu',
    tick: Callable[[], object] = lambda: None,
) -> Eigenvalues:
    """The algebraically largest eigenvalues.

    Args:
        product: Multiplies the matrix with vectors, (size,) float64 each.
        size: Rows of the matrix.
        count: How many, at least 1 and less than ``size``.
        tolerance: Of ARPACK, relative to the eigenvalue.
        seed: Of the vector that the iteration starts from.
        device: Where ``product`` wants its vectors.
        tick: Called after each product.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    products = 0

    def multiply(vector: Any) -> Any:
        nonlocal products
        products += 1
        (result,) = product([torch.from_numpy(np.array(vector, np.float64).reshape(-1)).to(device)])
        tick()
        return result.cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(size)
    if not multiply(start).any():  # linear in the weights: ARPACK would find no direction to go
        return Eigenvalues([0.0] * count, [0.0] * count, tolerance, products, torch.eye(count, size).double())
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    try:
        values, vectors = eigsh(
            operator, k=count, which='LA', v0=start, tol=tolerance, ncv=min(size, max(_VECTORS, 2 * count + 1)),
            maxiter=_RESTARTS,
        )  # fmt: skip
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(values)[::-1]
    residuals = [float(np.linalg.norm(multiply(vectors[:, i]) - values[i] * vectors[:, i])) for i in order]
    found = torch.from_numpy(np.ascontiguousarray(vectors.T[order]))
    return Eigenvalues([float(values[i]) for i in order], residuals, tolerance, products, found)


def hutchinson(
    product: Product,
    size: int,
    draws: int,
    seed: int,
    device: torch.device | str = 'cpu',
    tick: Callable[[], object] = lambda: None,
) -> Trace:
    """Estimate a trace.

    Args:
        product: Multiplies the matrix with vectors, (size,) float64 each.
        size: Rows of the matrix.
        draws: At least 2.
        seed: Of the draws.
        device: Where ``product`` wants its vectors.
        tick: Called after each draw.
    """
    generator = torch.Generator().manual_seed(seed)
    forms: list[float] = []
    while len(forms) < draws:
        signs = [
            (2.0 * torch.randint(0, 2, (size,), generator=generator) - 1).double().to(device)
            for _ in range(min(_TOGETHER, draws - len(forms)))
        ]
        for vector, image in zip(signs, product(signs), strict=True):
            forms.append(float(vector @ image))
            tick()
    return Trace(float(np.mean(forms)), float(np.std(forms, ddof=1)) / math.sqrt(draws), draws)
