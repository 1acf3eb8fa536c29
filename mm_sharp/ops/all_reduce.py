"""Gradients averaged over the ranks by hand, where DDP's own averaging does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce_params
from torch import Tensor, nn


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of ``parameters`` by their averages over all ranks; a missing one counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average([parameter.grad for parameter in parameters if parameter.grad is not None])


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their averages over all ranks, in one all-reduce a dtype."""
    all_reduce_params(list(tensors), coalesce=True, op='mean')
