"""The perturbation of sharpness-aware minimization, as pure functions over lists of tensors.

``g`` is the gradient of the batch loss, ``w_t`` and ``g_t`` are one tensor of the weights and its gradient, and norms
without an index are over all perturbed tensors together. The argument ``adaptive`` chooses among:

- ``False``: SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2). ``rho`` is the perturbation's length::

      e = rho * g / (||g|| + eps)

- ``True``: ASAM (Kwon et al. 2021, arXiv 2102.11600, eq. 9), with ``T = |w| + eta`` element by element::

      e = rho * T^2 g / (||T g|| + eps)

- ``'tensor'`` (ours): ASAM's formula with one ``T`` a tensor, the tensor's norm::

      e_t = rho * T_t^2 g_t / (||T g|| + eps),    T_t = ||w_t||,    ||T g||^2 = sum over t of T_t^2 ||g_t||^2

  The relative changes ``||e_t|| / ||w_t||`` of all tensors, squared and added up, give ``rho^2``: no tensor moves by
  more than ``rho`` of its own norm.

- ``'layer'``: each tensor by ``rho`` of its own norm, along its own gradient, after the layer-wise scaling of
  Look-LayerSAM (Liu et al. 2022, arXiv 2203.02714)::

      e_t = rho * ||w_t|| * g_t / (||g_t|| + eps)

- ``'global'`` (ours): SAM's direction, with a length of ``rho`` of the norm of all perturbed weights::

      e = rho * ||w|| * g / (||g|| + eps)

With the last three ``rho`` has no unit: it is a share of the weights' norm. With ``'tensor'`` and ``'layer'`` a tensor
that is zero has no scale to measure by, and stays where it is; ``eta`` is ASAM's alone.

Deviations, all ours: ``eps`` is added to the norm, so that a zero gradient gives no perturbation; ASAM uses ``T`` for
every tensor, biases included; a gradient that is not finite gives ``e = 0``.

ESAM's stochastic weight perturbation (Du et al. 2022, arXiv 2110.03141, section 3.1) takes each tensor with probability
``beta`` (:func:`weight_mask`) and scales ``e`` by ``1 / beta``. As in the authors' code the norm is that of the tensors
taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mm_sharp.ops import multi_tensor

# What the argument `adaptive` may be, besides SAM's False and ASAM's True.
BY_TENSOR = ('tensor', 'layer')  # each tensor by its own norm
RELATIVE = (*BY_TENSOR, 'global')
_kind = attrgetter('dtype', 'device')


def group_by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of ``tensors`` that one ``torch._foreach_*`` call may take together."""
    kinds = list(map(_kind, tensors))
    if kinds and kinds.count(kinds[0]) == len(kinds):
        return [list(range(len(kinds)))]
    groups: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each of one or more dense tensors, of any devices and dtypes, without host synchronisation.

    (n,), in at least float32, on the device of the first tensor.
    """
    return by_group(multi_tensor.norms, tensors)


def by_group(of_each: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """What ``of_each`` gives of one or more tensors of one device and dtype, (n,), for tensors of any.

    (n,), on the device of the first tensor.
    """
    groups = group_by_device_and_dtype(tensors)
    found = [of_each([tensors[i] for i in group]) for group in groups]
    if len(groups) == 1:
        return found[0]
    dtype = reduce(torch.promote_types, [of_group.dtype for of_group in found])
    values: dict[int, Tensor] = {}
    for group, part in zip(groups, found, strict=True):
        values.update(zip(group, part.to(device=tensors[0].device, dtype=dtype).unbind(), strict=True))
    # Not by a tensor of indices, whose way to a GPU the host would wait for.
    return torch.stack([values[index] for index in range(len(values))])


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the tensors of :func:`tensor_norms` taken as one vector; a scalar."""
    total: Tensor = torch.linalg.vector_norm(tensor_norms(tensors))
    return total


class Norms:
    """Takes the norms of the perturbed tensors, which lie whole in this process."""

    def of_all(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all of them together; scalar."""
        return global_norm(tensors)

    def of_each(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The 2-norms of each of the parameters, and of their gradients; (n,) both."""
        return tensor_norms(parameters), tensor_norms(gradients)

    def own(self, values: Tensor) -> Tensor:
        """Of ``values``, one for each norm of :meth:`of_each`, those of the tensors that it was given."""
        return values


_WHOLE = Norms()


@dataclass(frozen=True)
class Direction:
    """How a perturbation is made of the gradients.

    ``rho`` is the radius, in the units of the weights' norm; with ``stretches`` in those of the stretched weights, with
    ``relative`` as a share of the weights' norm.
    """

    rho: float
    stretches: list[Tensor] | None = None  # T of each tensor, of its shape; None for 1. Scratch memory afterwards.
    relative: str | None = None  # one of ``RELATIVE``, in place of ``stretches``; None for SAM and ASAM


@torch.no_grad()
def asam_stretches(parameters: Sequence[Tensor], eta: float) -> list[Tensor]:
    """ASAM's ``T = |w| + eta`` of each tensor."""
    return [parameter.abs().add_(eta) for parameter in parameters]


def perturb_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    *,
    eps: float = 1e-12,
    inverse_grad_scale: Tensor | None = None,
    norms: Norms = _WHOLE,
) -> Tensor:
    """Add the perturbation to the parameters, in place, within ``no_grad``; the module's docstring has its equations.

    Args:
        parameters: Tensors ``w``; they keep their storage.
        gradients: Their gradients ``g``; scratch memory afterwards.
        direction: ``rho``, and ``T`` or what the perturbation is relative to.
        eps: Added to the norm.
        inverse_grad_scale: Scalar that undoes the gradients' loss scaling, or None.
        norms: What takes the norms, where the tensors are pieces of larger ones.

    Returns:
        ``||g||_2``, or ``||T g||_2`` where there is a ``T``, without loss scaling, on the first gradient's device.
        Where it is not finite, the parameters stay as they were.
    """
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    norm, divisor, radius = _lengths(parameters, gradients, direction, norms)
    if inverse_grad_scale is not None:
        inverse = inverse_grad_scale.to(device=norm.device, dtype=norm.dtype)
        norm, divisor, radius = norm * inverse, divisor * inverse, radius * inverse
    on_host = norm.device.type == 'cpu'
    if on_host and not math.isfinite(norm.item()):
        return norm
    divisor = divisor + eps
    # Of a number torch does the same, after a detour through Python.
    step: Tensor = radius / divisor if isinstance(radius, Tensor) else divisor.reciprocal() * radius
    if step.ndim:
        step = norms.own(step)
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    for group in group_by_device_and_dtype(gradients):
        weights, steps = [parameters[i] for i in group], [gradients[i] for i in group]
        factors = step.to(steps[0].device, steps[0].dtype)
        if step.ndim and len(group) < len(step):
            factors = torch.stack([factors[i] for i in group])
        multi_tensor.add_scaled_(weights, steps, factors, None if on_host else norm.isfinite())
    return norm


def _lengths(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], direction: Direction, norms: Norms
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The norm to report; and what the gradients are to be divided and multiplied by, scalars or one for each norm."""
    if direction.relative == 'tensor':
        stretches, of_gradients = norms.of_each(parameters, gradients)
        norm = torch.linalg.vector_norm(stretches * of_gradients)
        return norm, norm, direction.rho * stretches.square()
    if direction.relative == 'layer':
        of_weights, of_gradients = norms.of_each(parameters, gradients)
        return torch.linalg.vector_norm(of_gradients), of_gradients, direction.rho * of_weights
    norm = norms.of_all(gradients)
    if direction.relative == 'global':
        return norm, norm, direction.rho * norms.of_all(parameters)
    return norm, norm, direction.rho


def weight_mask(count: int, beta: float, generator: torch.Generator) -> list[bool]:
    """Which of ``count`` tensors take part in the perturbation (ESAM's SWP), each with probability ``beta``.

    At least one does: where none was drawn, one is taken at random (ours). ``generator`` is the CPU's.
    """
    mask = torch.rand(count, generator=generator, dtype=torch.float64) < beta
    # Drawn in any case, so that later draws of the same generator do not depend on this one's outcome.
    spare = int(torch.randint(count, (), generator=generator))
    if not mask.any():
        mask[spare] = True
    chosen: list[bool] = mask.tolist()
    return chosen
