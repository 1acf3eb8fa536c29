"""How far a step has moved the weights, and where: by layer and by part of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mm_sharp.ops.parameters import plain_name
from mm_sharp.step.timing import PerturbationSizes


@dataclass(frozen=True)
class Part:
    """A part of the model."""

    name: str  # in the model
    perturbation: float  # ||e|| over its tensors
    weights: float  # ||w|| over the same


@dataclass(frozen=True)
class Scale:
    """The sizes of one step's perturbation, on the host."""

    whole: Part  # all that is perturbed
    layers: list[Part]  # by the module that a tensor belongs to itself, such as ``head.final_layer``
    parts: list[Part]  # by the model's top-level parts, such as ``head``, those of which nothing is perturbed too
    tensors: int  # how many are perturbed
    slope: float  # <e, g>, the rise of the loss, were it linear

    @property
    def relative(self) -> float:
        """||e|| / ||w||; 0 where the weights are."""
        return self.whole.perturbation / self.whole.weights if self.whole.weights else 0.0

    def share(self, part: Part) -> float:
        """The share of the perturbation's squared norm that lies in ``part``."""
        whole = self.whole.perturbation
        return (part.perturbation / whole) ** 2 if whole else 0.0


def scale_of(sizes: PerturbationSizes, model: nn.Module) -> Scale:
    """The sizes by part of the model; waits for the device."""
    known = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    names = [known.get(id(parameter), 'others') for parameter in sizes.parameters]
    # Of all of the model: which tensors are perturbed may differ from step to step.
    part_of = dict(zip(known.values(), top_level(list(known.values())), strict=True))
    moves, weights = sizes.perturbation.tolist(), sizes.weights.tolist()
    layers = _grouped([name.rpartition('.')[0] or name for name in names], moves, weights)
    parts = _grouped([part_of.get(name, name) for name in names], moves, weights, part_of.values())
    whole = Part('', math.hypot(*moves), math.hypot(*weights))
    return Scale(whole, layers, parts, len(names), float(sizes.slope))


def _grouped(
    keys: Sequence[str], moves: Sequence[float], weights: Sequence[float], all_keys: Iterable[str] = ()
) -> list[Part]:
    """The norms over all tensors of one key; those of ``all_keys`` without a tensor are 0."""
    found: dict[str, list[tuple[float, float]]] = {key: [] for key in (*all_keys, *keys)}
    for key, move, weight in zip(keys, moves, weights, strict=True):
        found[key].append((move, weight))
    return [Part(key, math.hypot(*(m for m, _ in own)), math.hypot(*(w for _, w in own))) for key, own in found.items()]


def top_level(names: Sequence[str]) -> list[str]:
    """The part of the model that each tensor belongs to: the first of its name that they do not all share."""
    paths = [name.split('.')[:-1] or [name] for name in names]
    while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return [path[0] for path in paths]
