"""The wrappers that the contract suite runs over, by name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from mm_sharp import SAMOptimWrapper
from mm_sharp.two_pass import TwoPassOptimWrapper

WRAPPERS: dict[str, tuple[type[TwoPassOptimWrapper], dict[str, Any]]] = {
    'sam': (SAMOptimWrapper, {'rho': 0.05}),
    'asam': (SAMOptimWrapper, {'rho': 0.5, 'adaptive': True}),
    'sam-weights': (SAMOptimWrapper, {'rho': 0.05, 'perturb': 'weights'}),
}


def momentum_sgd(model: nn.Module, lr: float = 0.05) -> Optimizer:
    """The base optimizer of most tests."""
    return SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)


def build(name: str, model: nn.Module, optimizer: Optimizer | None = None, **kwargs: Any) -> TwoPassOptimWrapper:
    """The wrapper called ``name`` around ``model``, with ``kwargs`` on top of its own arguments."""
    kind, own = WRAPPERS[name]
    return kind(optimizer or momentum_sgd(model), **{**own, **kwargs})
