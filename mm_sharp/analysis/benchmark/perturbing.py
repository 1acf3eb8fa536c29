"""How fast the weights are perturbed and put back, without a model, against the device's copy bandwidth (ours)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mm_sharp.analysis.benchmark.compare import Quartiles, columns, quartiles
from mm_sharp.analysis.benchmark.steps import seconds_of
from mm_sharp.errors import UsageError
from mm_sharp.ops.perturbation import Direction, TensorBackup, perturb_

# Whole tensors that are read and written, in the order in which the operators run.
_COPY = 1 + 1
_CLIMB = (1 + 1) + 1 + (1 + 1) + (2 + 1)  # copy of the weights; norm; gradients times the step; weights plus that
_RESTORE = 1 + 1
_FLOAT = torch.float32.itemsize
# As torch's allocators do it: tensors begin at multiples of 512 bytes.
_ALIGNMENT = 512 // _FLOAT
_BOTTLENECKS = ((64, 3), (128, 4), (256, 6), (512, 3))


@dataclass(frozen=True)
class ClimbCost:
    """What the perturbation of so many weights costs.

    Args:
        parameters: Weights, float32.
        tensors: That hold them.
        copy_rate: Bytes a second of one copy of all weights in one piece.
        climb_rate: Of the climb, the copy that it keeps included.
        restore_rate: Of the restoration.
    """

    parameters: int
    tensors: int
    copy_rate: Quartiles
    climb_rate: Quartiles
    restore_rate: Quartiles

    @property
    def share(self) -> float:
        """Climb and restoration together: bytes a second, over the copy's."""
        moved = _CLIMB + _RESTORE
        together = moved / (_CLIMB / self.climb_rate.median + _RESTORE / self.restore_rate.median)
        return together / self.copy_rate.median


def measure_climb(parameters: int, rounds: int, device: torch.device) -> ClimbCost:
    """Climb, put back and copy, in interleaved rounds.

    Args:
        parameters: Weights, at least 1.
        rounds: At least 1; one more, which is not timed, comes first.
        device: Where the weights are.

    Raises:
        UsageError: Weights, gradients and copy do not fit into the device's memory.
    """
    shapes = resnet_shapes(parameters)
    _check_memory(parameters, device)
    flat_weights, weights = _allocate(shapes, device)
    flat_gradients, gradients = _allocate(shapes, device)
    backup = TensorBackup()

    def save_and_climb() -> None:
        backup.save(weights)
        perturb_(weights, gradients, Direction(0.05))

    # The gradients are scratch memory after a climb: the copy also makes new ones.
    calls: dict[str, Callable[[], object]] = {
        'copy': partial(flat_gradients.copy_, flat_weights),
        'climb': save_and_climb,
        'restore': backup.restore,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    moved = {'copy': _COPY * flat_weights.numel(), 'climb': _CLIMB * parameters, 'restore': _RESTORE * parameters}
    rates = {name: quartiles([_FLOAT * moved[name] / taken for taken in seconds[name][1:]]) for name in calls}
    return ClimbCost(parameters, len(shapes), rates['copy'], rates['climb'], rates['restore'])


def resnet_shapes(parameters: int) -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50's tensors, again and again until there are as many weights; the last one is cut."""
    shapes: list[tuple[int, ...]] = []
    left = parameters
    while left:
        for shape in _resnet50():
            size = torch.Size(shape).numel()
            if size >= left:
                return [*shapes, shape if size == left else (left,)]
            shapes.append(shape)
            left -= size
    return shapes


def _resnet50() -> list[tuple[int, ...]]:
    """Convolutions, each with the two vectors of its BatchNorm, and the classifier."""
    convolutions = [(64, 3, 7, 7)]
    before = 64
    for width, blocks in _BOTTLENECKS:
        for block in range(blocks):
            convolutions += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, before, 1, 1))
            before = 4 * width
    return [shape for conv in convolutions for shape in (conv, conv[:1], conv[:1])] + [(1000, 2048), (1000,)]


def _allocate(shapes: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and tensors in it; numbers of ordinary size."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    flat = torch.linspace(-1, 1, sum(rooms), device=device)
    parts = zip(flat.split(rooms), sizes, shapes, strict=True)
    return flat, [part[:size].view(shape) for part, size, shape in parts]


def _check_memory(parameters: int, device: torch.device) -> None:
    needed, free = 3 * _FLOAT * parameters, free_memory(device)
    # The rest is for whatever else runs.
    if free is not None and needed > 0.9 * free:
        raise UsageError(
            f'--parameters: {parameters:,} weights, their gradients and a copy take {needed / 1e9:.1f} GB, and of the '
            f'memory of {device} {free / 1e9:.1f} GB are free: give a smaller number'
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had; None where there is no telling."""
    if device.type == 'cuda':
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != 'cpu':
        return None
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        lines = dict(line.split(':') for line in meminfo.read_text().splitlines())
        return 1024 * int(lines['MemAvailable'].split()[0])
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def climb_table(costs: Sequence[ClimbCost]) -> str:
    """The costs as text, and which bytes are counted."""
    head = ['weights', 'tensors', 'copy, GB/s', 'climb, GB/s', 'restore, GB/s', 'climb and restore over copy']
    lines = [
        [
            f'{cost.parameters:,}',
            f'{cost.tensors:,}',
            *(_rate(rate) for rate in (cost.copy_rate, cost.climb_rate, cost.restore_rate)),
            f'{100 * cost.share:.0f} %',
        ]
        for cost in costs
    ]
    note = (
        f'Counted, in float32: for each weight {_CLIMB} numbers read or written by the climb (2 copy, 1 norm, 2 '
        f'scaling, 3 addition), {_RESTORE} by the restoration, {_COPY} by the copy of all weights in one piece.'
    )
    return f'{columns([head, *lines])}\n{note}'


def _rate(rate: Quartiles) -> str:
    return f'{rate.median / 1e9:.2f} ({rate.low / 1e9:.2f} to {rate.high / 1e9:.2f})'
