"""Kernels over many tensors at once, for a GPU; only :mod:`mm_sharp.ops.multi_tensor` imports this file.

In Triton, which torch brings along where it is built for a GPU. A program of a kernel works on ``BLOCK`` elements of
one tensor: ``tensor_of`` says of which, ``start_of`` where they begin, ``sizes`` how many the tensor has. Tensors are
given by their addresses. ``KIND`` is their element type, ``WORK`` the type that is computed in (as torch does, float32
for those of 16 bits), and ``ALIGNED`` says whether all begin at multiples of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def piece(tensor_of: tl.tensor, start_of: tl.tensor, sizes: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Which tensor a program works on, the places of its elements there, and which of these are inside."""
    index = tl.load(tensor_of + tl.program_id(0))
    places = tl.load(start_of + tl.program_id(0)) + tl.arange(0, BLOCK)
    return index, places, places < tl.load(sizes + index)


@triton.jit  # type: ignore[untyped-decorator]
def add_scaled(
    tensors: tl.tensor,
    vectors: tl.tensor,
    steps: tl.tensor,
    finite: tl.tensor,
    tensor_of: tl.tensor,
    start_of: tl.tensor,
    sizes: tl.tensor,
    EACH: tl.constexpr,
    KIND: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``vector *= step; tensor += vector``, rounded after each; where not ``finite``, ``vector = 0`` alone."""
    index, places, inside = piece(tensor_of, start_of, sizes, BLOCK)
    tensor, vector = tl.load(tensors + index), tl.load(vectors + index)
    if ALIGNED:
        tensor, vector = tl.multiple_of(tensor, 16), tl.multiple_of(vector, 16)
    tensor, vector = tensor.to(tl.pointer_type(KIND)) + places, vector.to(tl.pointer_type(KIND)) + places
    if tl.load(finite):
        step = tl.load(steps + (index if EACH else 0)).to(WORK)
        moved = (tl.load(vector, mask=inside, other=0.0).to(WORK) * step).to(KIND)
        tl.store(vector, moved, mask=inside)
        there = tl.load(tensor, mask=inside, other=0.0).to(WORK)
        tl.store(tensor, (there + moved.to(WORK)).to(KIND), mask=inside)
    else:
        tl.store(vector, tl.zeros([BLOCK], KIND), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def zero_unless(
    tensors: tl.tensor,
    finite: tl.tensor,
    tensor_of: tl.tensor,
    start_of: tl.tensor,
    sizes: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``tensor = 0`` unless ``finite``."""
    if not tl.load(finite):
        index, places, inside = piece(tensor_of, start_of, sizes, BLOCK)
        tensor = tl.load(tensors + index).to(tl.pointer_type(KIND)) + places
        tl.store(tensor, tl.zeros([BLOCK], KIND), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def add_squares(
    tensors: tl.tensor,
    sums: tl.tensor,
    tensor_of: tl.tensor,
    start_of: tl.tensor,
    sizes: tl.tensor,
    KIND: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of the squares of each program's elements."""
    index, places, inside = piece(tensor_of, start_of, sizes, BLOCK)
    tensor = tl.load(tensors + index)
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
    tensor = tensor.to(tl.pointer_type(KIND)) + places
    values = tl.load(tensor, mask=inside, other=0.0).to(WORK)
    tl.store(sums + tl.program_id(0), tl.sum(values * values, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def add_up(sums: tl.tensor, roots: tl.tensor, first_of: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The root of the sum of each tensor's ``sums``, from its own first to the next one's."""
    place, end = tl.load(first_of + tl.program_id(0)), tl.load(first_of + tl.program_id(0) + 1)
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    while place < end:
        places = place + tl.arange(0, BLOCK)
        total += tl.load(sums + places, mask=places < end, other=0.0)
        place += BLOCK
    tl.store(roots + tl.program_id(0), tl.sqrt(tl.sum(total, axis=0)))


@triton.jit  # type: ignore[untyped-decorator]
def mark_not_finite(
    tensors: tl.tensor,
    finite: tl.tensor,
    tensor_of: tl.tensor,
    start_of: tl.tensor,
    sizes: tl.tensor,
    KIND: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``finite`` of a tensor becomes False if it has an element that is not."""
    index, places, inside = piece(tensor_of, start_of, sizes, BLOCK)
    tensor = tl.load(tensors + index).to(tl.pointer_type(KIND)) + places
    values = tl.load(tensor, mask=inside, other=0.0).to(WORK)
    if tl.sum(((values - values) != 0).to(tl.int32), axis=0) > 0:
        tl.store(finite + index, False)
