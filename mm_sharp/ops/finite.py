"""Whether tensors are finite, and gradients that are not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_sharp.ops.perturbation import group_by_device_and_dtype

_TRUE = torch.tensor(True)


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite.

    Args:
        tensors: Any number; devices and dtypes may be mixed, and they may be sparse or empty.

    Returns:
        Scalar, bool, on the device of the first one that is not empty; True on the CPU where there is none. No host
        synchronisation.
    """
    if quickly_finite(tensors):
        return _TRUE
    dense = [tensor if tensor.layout == torch.strided else tensor._values() for tensor in tensors]
    dense = [tensor for tensor in dense if tensor.numel()]
    if not dense:
        return _TRUE
    return _finite_norms(dense, float('inf')).all()


@torch.no_grad()
def finite_each(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor, whether every element is finite.

    Args:
        tensors: At least one, dense, and none of them empty; devices and dtypes may be mixed.

    Returns:
        (N,), bool, on the device of the first one. No host synchronisation.
    """
    return _finite_norms(tensors, float('inf'))


def quickly_finite(tensors: Sequence[Tensor]) -> bool:
    """A quick look at tensors on the CPU, of one dtype: True if they are finite, False if that is not known yet.

    2-norms take less time than the largest magnitude, but overflow before an element does.
    """
    if not tensors:
        return True
    kind = tensors[0].dtype
    if not all(t.dtype is kind and t.layout is torch.strided and t.is_cpu and t.numel() for t in tensors):
        return False
    return math.isfinite(torch.stack(torch._foreach_norm(list(tensors), 2)).sum().item())


def _finite_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Of each tensor, whether its norm is finite, (N,), bool, on the device of the first one."""
    groups = group_by_device_and_dtype(tensors)
    found = [torch.stack(torch._foreach_norm([tensors[i] for i in group], order)).isfinite() for group in groups]
    if len(groups) == 1:
        return found[0]
    finite = torch.cat([flags.to(tensors[0].device, non_blocking=True) for flags in found])
    order_of = sorted(range(len(tensors)), key=[index for group in groups for index in group].__getitem__)
    return finite[order_of]


@torch.no_grad()
def zero_unless(finite: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set every element of ``tensors`` to zero where ``finite`` is not True, without asking the device."""
    for tensor in tensors:
        dense = tensor if tensor.layout == torch.strided else tensor._values()
        dense.masked_fill_(~finite.to(dense.device), 0)
