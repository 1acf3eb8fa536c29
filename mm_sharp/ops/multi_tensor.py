"""What torch has no operation over many tensors for, in one or two kernels on a GPU.

A model has hundreds of tensors. To start a kernel for each of them, or to gather a result of each in one tensor, takes
the host longer than the GPU takes for the arithmetic. Where Triton is missing, or the tensors are few or lie in memory
in unusual ways, torch's operations do the same: with equal results, bit for bit, but for the rounding of norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from importlib import import_module
from itertools import chain
from operator import or_
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from mm_sharp.ops.host_copy import to_device

FEW = 16  # on fewer tensors torch's own operations are as fast
_BLOCK = 4096  # elements a program
# Triton's names of an element type, and of the type that torch computes in.
_KINDS = {
    torch.float32: ('float32', 'float32'),
    torch.float64: ('float64', 'float64'),
    torch.float16: ('float16', 'float32'),
    torch.bfloat16: ('bfloat16', 'float32'),
}


def add_scaled_(tensors: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor, finite: Tensor | None) -> None:
    """``vectors *= step; tensors += vectors``, in place; unless ``finite``, the vectors become 0 and that is all.

    All of one device and dtype; ``step`` is a scalar or, (n,), one for each; ``finite`` a scalar of bool, or None where
    the host knows that it is so. No host synchronisation.
    """
    finite = None if finite is None else finite.to(tensors[0].device)
    launch = None if finite is None else _launch('add_scaled', tensors, vectors)
    if finite is not None and launch is not None:
        launch(launch.table[: len(tensors)], launch.table[len(tensors) :], step, finite, EACH=step.ndim > 0)
        _count_as_written([*tensors, *vectors])
        return
    torch._foreach_mul_(list(vectors), list(step.unbind()) if step.ndim else step)
    if finite is not None:
        _zero_one_by_one(vectors, finite)
    torch._foreach_add_(list(tensors), list(vectors))


def zero_unless_(finite: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set ``tensors``, of one device and dtype, to zero unless ``finite``, a scalar of bool; the host does not wait."""
    finite = finite.to(tensors[0].device)
    launch = _launch('zero_unless', tensors)
    if launch is not None:
        launch(launch.table, finite)
        _count_as_written(tensors)
        return
    _zero_one_by_one(tensors, finite)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each of the tensors, of one device and dtype: (n,), in at least float32. The host does not wait."""
    launch = _launch('add_squares', tensors)
    if launch is not None:
        work = torch.promote_types(tensors[0].dtype, torch.float32)
        sums = tensors[0].new_empty(launch.plan.programs, dtype=work)
        launch(launch.table, sums)
        found = sums.new_empty(len(tensors))
        with torch.cuda.device(found.device):
            launch.kernels.add_up[(len(tensors),)](sums, found, launch.plan.first_of, BLOCK=256)
        return found
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        # The squares of half-precision gradients overflow or vanish long before the gradients do.
        return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors])
    return torch.stack(torch._foreach_norm(list(tensors), 2))


def finite_each(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each of the tensors, none empty, of one device and dtype, is finite: (n,). The host does not wait."""
    launch = _launch('mark_not_finite', tensors)
    if launch is not None:
        found = torch.ones(len(tensors), dtype=torch.bool, device=tensors[0].device)
        launch(launch.table, found)
        return found
    return torch.stack(torch._foreach_norm(list(tensors), float('inf'))).isfinite()


def _count_as_written(tensors: Sequence[Tensor]) -> None:
    """Have autograd and all who ask for versions know that the tensors were written to."""
    try:
        increment_version(list(tensors))
    except TypeError:  # torch before 2.6 takes one
        for tensor in tensors:
            increment_version(tensor)


def _zero_one_by_one(tensors: Sequence[Tensor], finite: Tensor) -> None:
    corrupted = ~finite
    for tensor in tensors:
        # 0 * inf is nan, so that a factor of zero cannot stand for this.
        tensor.masked_fill_(corrupted, 0)


class _Plan(NamedTuple):
    """Which programs of a kernel work on which elements."""

    programs: int
    tensor_of: Tensor  # (programs,)
    start_of: Tensor  # (programs,): the first element of that tensor
    sizes: Tensor  # (n,)
    first_of: Tensor  # (n + 1,): the first program of each tensor


class _Launch(NamedTuple):
    """A kernel about to run on some tensors; it takes what it has beside :class:`_Plan`."""

    kernels: ModuleType
    name: str
    table: Tensor  # addresses
    plan: _Plan
    fixed: dict[str, Any]

    def __call__(self, *args: Tensor, **constants: bool) -> None:
        kernel, plan = getattr(self.kernels, self.name), self.plan
        constants = {key: value for key, value in self.fixed.items() if key in kernel.arg_names} | constants
        with torch.cuda.device(self.table.device):
            kernel[(plan.programs,)](
                *(*args, plan.tensor_of, plan.start_of, plan.sizes),
                **constants,
                BLOCK=_BLOCK,
                num_warps=8,
                enable_fp_fusion=False,  # torch rounds the product, too
            )


def _launch(name: str, *groups: Sequence[Tensor]) -> _Launch | None:
    """The kernel of that name for tensors, and for others in pairs with them; None where they are not for kernels."""
    tensors = groups[0]
    device, dtype = tensors[0].device, tensors[0].dtype
    kernels = _kernels(device)
    if kernels is None or len(tensors) < FEW or dtype not in _KINDS or not _fit(groups):
        return None
    # `map` of torch's own methods: a loop in Python would take as long as the rest of the step takes here.
    addresses = tuple(chain.from_iterable(map(Tensor.data_ptr, group) for group in groups))
    plan = _plan(tuple(map(Tensor.numel, tensors)), device)
    if not plan.programs:
        return None
    kind, work = (getattr(kernels.tl, known) for known in _KINDS[dtype])
    fixed = {'KIND': kind, 'WORK': work, 'ALIGNED': reduce(or_, addresses) % 16 == 0}
    return _Launch(kernels, name, _to_device(addresses, device), plan, fixed)


@lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, where they can run on ``device``."""
    if device.type != 'cuda':
        return None
    try:
        return import_module('mm_sharp.ops.kernels')
    except ImportError:
        return None


def _fit(groups: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the tensors are dense, and those in pairs of one layout."""
    if not all(set(map(type, group)) <= {Tensor, nn.Parameter} for group in groups):
        return False
    if all(all(map(Tensor.is_contiguous, group)) for group in groups):
        return True
    dense = (
        tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        for tensor in groups[0]
    )
    pairs = (zip(groups[0], group, strict=True) for group in groups[1:])
    return all(dense) and all(a.stride() == b.stride() for a, b in chain.from_iterable(pairs))


# The same in most steps: gradients mostly get the memory that the last step's had.
@lru_cache(maxsize=32)
def _to_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(np.array(addresses, np.uint64).view(np.int64), device)


@lru_cache(maxsize=32)
def _plan(sizes: tuple[int, ...], device: torch.device) -> _Plan:
    counts = [-(-size // _BLOCK) for size in sizes]
    first_of = np.concatenate([[0], np.cumsum(counts)])
    tensor_of = np.repeat(np.arange(len(sizes)), counts)
    start_of = (np.arange(len(tensor_of)) - first_of[tensor_of]) * _BLOCK
    arrays = (tensor_of.astype(np.int32), start_of, np.array(sizes, np.int64), first_of.astype(np.int32))
    return _Plan(len(tensor_of), *(to_device(array, device) for array in arrays))
