"""How fast the weights are perturbed and restored, without a model, against the device's copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mm_sharp.analysis.benchmark.steps import seconds_of
from mm_sharp.analysis.benchmark.table import quartiles
from mm_sharp.analysis.tables import columns
from mm_sharp.ops.perturbation import Direction, perturb_
from mm_sharp.ops.tensor_backup import TensorBackup

# Numbers read and written for each weight; perturbation: copy; norm; gradients times the step; weights plus that.
_COPY, _PERTURB, _RESTORE = 1 + 1, (1 + 1) + 1 + (1 + 1) + (2 + 1), 1 + 1
_FLOAT = torch.float32.itemsize
_RATES = ('copy_rate', 'climb_rate', 'restore_rate')


def measure_perturbing(parameters: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Copy, perturb and restore so many weights, in interleaved rounds, after one that is not timed.

    Returns bytes a second of one copy of all weights in one piece, of the perturbation with its copy (``climb_rate``)
    and of the restoration; ``share_of_copy``: those of the last two over the copy's.
    """
    shapes = resnet_shapes(parameters)
    (flat_weights, weights), (flat_gradients, gradients) = (_allocate(shapes, device) for _ in range(2))
    backup = TensorBackup()

    def perturb() -> None:
        backup.save(weights)
        perturb_(weights, gradients, Direction(0.05))

    # The gradients are scratch memory after a perturbation: the copy also makes new ones.
    calls: list[Callable[[], object]] = [partial(flat_gradients.copy_, flat_weights), perturb, backup.restore]
    moved = [_COPY * flat_weights.numel(), _PERTURB * parameters, _RESTORE * parameters]
    seconds = [[seconds_of(call, device) for call in calls] for _ in range(rounds + 1)][1:]
    pairs = zip(moved, zip(*seconds, strict=True), strict=True)
    rates = [quartiles([_FLOAT * numbers / taken for taken in times]) for numbers, times in pairs]
    together = (_PERTURB + _RESTORE) / (_PERTURB / rates[1].median + _RESTORE / rates[2].median)
    named = dict(zip(_RATES, rates, strict=True))
    return {'parameters': parameters, 'tensors': len(shapes), **named, 'share_of_copy': together / rates[0].median}


def resnet_shapes(parameters: int) -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50's tensors, again and again until there are as many weights; the last one is cut."""
    from torchvision.models import resnet50

    with torch.device('meta'):
        resnet: list[tuple[int, ...]] = [tuple(parameter.shape) for parameter in resnet50().parameters()]
    shapes: list[tuple[int, ...]] = []
    while parameters:
        shape = resnet[len(shapes) % len(resnet)]
        shapes.append(shape if torch.Size(shape).numel() <= parameters else (parameters,))
        parameters -= torch.Size(shapes[-1]).numel()
    return shapes


def _allocate(shapes: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and tensors in it, at multiples of 512 bytes, as torch's allocators have it."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-size // 128) * 128 for size in sizes]
    flat = torch.linspace(-1, 1, sum(rooms), device=device)
    parts = zip(flat.split(rooms), sizes, shapes, strict=True)
    return flat, [part[:size].view(shape) for part, size, shape in parts]


def perturbing_table(costs: Sequence[Mapping[str, Any]]) -> str:
    """The costs as text, and which bytes are counted."""
    lines = [['weights', 'tensors', 'copy, GB/s', 'perturb, GB/s', 'restore, GB/s', 'both over copy']]
    for cost in costs:
        counts, rates = (f'{cost[key]:,}' for key in ('parameters', 'tensors')), (cost[key].text(1e9) for key in _RATES)
        lines.append([*counts, *rates, f'{100 * cost["share_of_copy"]:.0f} %'])
    return (
        f'{columns(lines)}\nCounted, in float32: for each weight {_PERTURB} numbers read or written by the '
        f'perturbation (2 copy, 1 norm, 2 scaling, 3 addition), {_RESTORE} by the restoration, {_COPY} by the copy.'
    )
