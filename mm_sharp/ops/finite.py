"""Whether tensors are finite, and gradients that are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from mm_sharp.ops import multi_tensor
from mm_sharp.ops.perturbation import by_group, group_by_device_and_dtype

TRUE = torch.tensor(True)
_SMALL = 4096  # elements; so small ones are copied into one sooner than asked one by one
_kind = attrgetter('dtype', 'is_cpu', 'layout')


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element is finite of tensors of any device, dtype and number, which may be sparse or empty.

    Scalar, bool, on the device of the first one that is not empty. No host synchronisation.
    """
    if quickly_finite(tensors):
        return TRUE
    dense = [tensor for tensor in _dense(tensors) if tensor.numel()]
    if not dense:
        return TRUE
    return finite_each(dense).all()


def finite_each(tensors: Sequence[Tensor]) -> Tensor:
    """Of one or more dense tensors, none of them empty, whether each is finite: (N,), on the first one's device."""
    return by_group(multi_tensor.finite_each, tensors)


def quickly_finite(tensors: Sequence[Tensor]) -> bool:
    """True if tensors on the CPU, of one dtype, are finite; False if that is not known.

    2-norms take less time than the largest magnitude, but overflow before an element does.
    """
    if not tensors:
        return True
    sizes = list(map(Tensor.numel, tensors))
    if set(map(_kind, tensors)) != {(tensors[0].dtype, True, torch.strided)} or not all(sizes):
        return False
    small = [tensor for tensor, size in zip(tensors, sizes, strict=True) if size <= _SMALL]
    large = [tensor for tensor, size in zip(tensors, sizes, strict=True) if size > _SMALL]
    norms = [*torch._foreach_norm(large, 2)] if large else []
    if small:
        norms.append(torch.linalg.vector_norm(_flatten_dense_tensors(small)))
    return math.isfinite(sum(map(float, norms)))


def choose(valid: Tensor, tensors: Sequence[Tensor], others: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """``tensors`` if ``valid``, a scalar of bool, else ``others()``; an accelerator is not waited for."""
    if valid.is_cpu:
        return tensors if valid else others()
    pairs = zip(tensors, others(), strict=True)
    return [torch.where(valid.to(tensor.device), tensor, other) for tensor, other in pairs]


@torch.no_grad()
def zero_unless(finite: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set ``tensors`` to zero unless ``finite``; the host does not wait."""
    dense = _dense(tensors)
    for group in group_by_device_and_dtype(dense):
        multi_tensor.zero_unless_(finite, [dense[i] for i in group])


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, the values in place of sparse ones."""
    return [tensor if tensor.layout == torch.strided else tensor._values() for tensor in tensors]
