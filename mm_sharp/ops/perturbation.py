"""The perturbation of sharpness-aware minimization, as pure functions over lists of tensors.

SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2), with ``g`` the gradient of the batch loss::

    e = rho * g / (||g||_2 + eps)

ASAM (Kwon et al. 2021, arXiv 2102.11600, eq. 9), with ``T = |w| + eta`` element by element::

    e = rho * T^2 g / (||T g||_2 + eps)

The norm is taken over all perturbed tensors together. Deviations, all ours: ``eps`` is added to the norm, so that
a zero gradient gives no perturbation; ASAM uses ``T`` for every tensor, biases included;
a gradient that is not finite gives ``e = 0``.

ESAM's stochastic weight perturbation (Du et al. 2022, arXiv 2110.03141, section 3.1) takes each tensor with probability
``beta`` (:func:`weight_mask`) and scales ``e`` by ``1 / beta``. As in the authors' code the norm is that of the tensors
taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def group_by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of ``tensors`` that one ``torch._foreach_*`` call may take together."""
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    if kinds and kinds.count(kinds[0]) == len(kinds):
        return [list(range(len(kinds)))]
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of one or more dense tensors, of any devices and dtypes, taken as one vector.

    Returns:
        A scalar in at least float32, on the device of the first tensor. No host synchronisation.
    """
    norms: list[Tensor] = []
    for group in group_by_device_and_dtype(tensors):
        members = [tensors[i] for i in group]
        if members[0].dtype in _LOW_PRECISION:
            # The squares of half-precision gradients overflow or vanish long before the gradients do.
            norms += [torch.linalg.vector_norm(member, dtype=torch.float32) for member in members]
        else:
            norms += torch._foreach_norm(members, 2)
    device = norms[0].device
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    if len({(n.device, n.dtype) for n in norms}) > 1:
        norms = [n.to(device=device, dtype=dtype) for n in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


@dataclass(frozen=True)
class Direction:
    """How a perturbation is made of the gradients.

    Args:
        rho: Radius, in the units of the weights' norm; with ``stretches`` in those of the stretched weights.
        stretches: T of each tensor, of its shape; None for 1. They are scratch memory afterwards.
    """

    rho: float
    stretches: list[Tensor] | None = None


@torch.no_grad()
def asam_stretches(parameters: Sequence[Tensor], eta: float) -> list[Tensor]:
    """ASAM's ``T = |w| + eta`` of each tensor."""
    return [parameter.abs().add_(eta) for parameter in parameters]


@torch.no_grad()
def perturb_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    *,
    eps: float = 1e-12,
    inverse_grad_scale: Tensor | None = None,
    norm_of: Callable[[Sequence[Tensor]], Tensor] = global_norm,
) -> Tensor:
    """Add the perturbation ``e = rho * T^2 g / (||T g|| + eps)`` to the parameters, in place.

    Args:
        parameters: Tensors ``w``; they keep their storage.
        gradients: Their gradients ``g``; scratch memory afterwards.
        direction: ``rho`` and ``T``.
        eps: Added to the norm.
        inverse_grad_scale: Scalar that undoes the gradients' loss scaling, or None.
        norm_of: What takes the norm, where the tensors are pieces of larger ones.

    Returns:
        ``||T g||_2`` without loss scaling, on the first gradient's device. Where it is not finite, the parameters stay
        as they were.
    """
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    norm = norm_of(gradients)
    radius: float | Tensor = direction.rho
    if inverse_grad_scale is not None:
        inverse = inverse_grad_scale.to(device=norm.device, dtype=norm.dtype)
        norm, radius = norm * inverse, radius * inverse
    on_host = norm.device.type == 'cpu'
    if on_host and not math.isfinite(norm.item()):
        return norm
    step: Tensor = radius / (norm + eps)
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    for group in group_by_device_and_dtype(gradients):
        steps = [gradients[i] for i in group]
        _add([parameters[i] for i in group], steps, step, None if on_host else norm.isfinite())
    return norm


def _add(parameters: list[Tensor], gradients: list[Tensor], step: Tensor, finite: Tensor | None) -> None:
    """``parameters += step * gradients``, all of one device and dtype; ``finite`` decides where the host cannot."""
    torch._foreach_mul_(gradients, step.to(gradients[0].device, gradients[0].dtype))
    if finite is not None:
        for gradient in gradients:
            # 0 * inf is nan, so that a zero step cannot stand for "no step". The host does not wait.
            gradient.masked_fill_(~finite.to(gradient.device), 0)
    torch._foreach_add_(parameters, gradients)


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
