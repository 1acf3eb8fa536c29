"""Whether tensors are finite, and gradients that are not (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_sharp.perturbation import group_by_device_and_dtype


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite.

    Args:
        tensors: Any number; devices and dtypes may be mixed, and they may be sparse or empty.

    Returns:
        Scalar, bool, on the device of the first one that is not empty; True on the CPU where there is none. No host
        synchronisation.
    """
    dense = [tensor if tensor.layout == torch.strided else tensor._values() for tensor in tensors]
    dense = [tensor for tensor in dense if tensor.numel()]
    if not dense:
        return torch.tensor(True)
    # On the CPU the 2-norm is much faster than the largest magnitude, but it overflows before an element does.
    if all(tensor.device.type == 'cpu' for tensor in dense) and _norms_finite(dense, 2):
        return torch.tensor(True)
    return _norms_finite(dense, float('inf'))


@torch.no_grad()
def finite_each(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor, whether every element is finite.

    Args:
        tensors: Any number of dense ones; devices and dtypes may be mixed.

    Returns:
        (N,), bool, on the device of the first one; on the CPU where there is none. No host synchronisation.
    """
    if not tensors:
        return torch.ones(0, dtype=torch.bool)
    device = tensors[0].device
    return torch.stack([tensor.isfinite().all().to(device, non_blocking=True) for tensor in tensors])


def _norms_finite(tensors: Sequence[Tensor], order: float) -> Tensor:
    norms: list[Tensor] = []
    for group in group_by_device_and_dtype(tensors):
        norms += torch._foreach_norm([tensors[i] for i in group], order)
    return torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).isfinite().all()


@torch.no_grad()
def zero_unless(finite: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set every element of ``tensors`` to zero where ``finite`` is not True, without asking the device."""
    for tensor in tensors:
        dense = tensor if tensor.layout == torch.strided else tensor._values()
        dense.masked_fill_(~finite.to(dense.device), 0)
