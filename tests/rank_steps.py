"""What each of several processes does with its part of a batch, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references_esam import ReferenceESAM
from tests.toys import Batch, ToyNet


def shard(batch: Batch, rank: int, processes: int) -> Batch:
    """The part of the batch that ``rank`` sees."""
    size = len(batch['inputs']) // processes
    return {key: value[rank * size : (rank + 1) * size] for key, value in batch.items()}


def loss_of(model: ToyNet, batch: Batch) -> Tensor:
    return model.parse_losses(model(**batch))[0]


def esam_gradients(reference: ReferenceESAM, climb: Batch, part: Batch, mask: list[bool]) -> list[Tensor]:
    """ESAM's final gradient on ``part``, the perturbation being that of the batch ``climb``."""
    model = reference.model
    parameters = list(model.parameters())
    chosen = [parameter for parameter, taken in zip(parameters, mask, strict=True) if taken]
    weights = [parameter.detach().clone() for parameter in parameters]
    before = model(**part, mode='tensor').detach()
    reference._climb(chosen, list(torch.autograd.grad(loss_of(model, climb), chosen)))
    rows = reference._select(part, before, range(len(before)))
    final = list(torch.autograd.grad(loss_of(model, {k: v[rows] for k, v in part.items()}), parameters))
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return final
