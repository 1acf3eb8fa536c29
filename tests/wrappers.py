"""The wrappers that the contract suite runs over, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from mm_sharp import (
    AUSAMOptimWrapper,
    ESAMOptimWrapper,
    FriendlySAMOptimWrapper,
    GSAMOptimWrapper,
    LookSAMOptimWrapper,
    MSAMOptimWrapper,
    SAMOptimWrapper,
    WSAMOptimWrapper,
)
from mm_sharp.samples.draw import BatchDraw
from mm_sharp.samples.history import Keys
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.toys import same_state

# What AUSAM was before it had its authors' schedule: draws of 60 %, of one range of scores, from the first step on.
OLD = {'schedule': 'constant'}
WRAPPERS: dict[str, tuple[type[TwoPassOptimWrapper], dict[str, Any]]] = {
    'sam': (SAMOptimWrapper, {'rho': 0.05}),
    'asam': (SAMOptimWrapper, {'rho': 0.5, 'adaptive': True}),
    'sam-interval': (SAMOptimWrapper, {'rho': 0.05, 'interval': 2}),
    'sam-weights': (SAMOptimWrapper, {'rho': 0.05, 'perturb': 'weights'}),
    'sam-tensor': (SAMOptimWrapper, {'rho': 0.02, 'adaptive': 'tensor', 'perturb': 'weights'}),
    'looksam': (LookSAMOptimWrapper, {'rho': 0.05, 'k': 2}),
    'friendlysam': (FriendlySAMOptimWrapper, {'rho': 0.05}),
    'gsam': (GSAMOptimWrapper, {'rho': 0.05}),
    'wsam': (WSAMOptimWrapper, {'rho': 0.05}),
    'wsam-coupled': (WSAMOptimWrapper, {'rho': 0.05, 'decouple': False}),
    'msam': (MSAMOptimWrapper, {'rho': 0.3}),
    'esam': (ESAMOptimWrapper, {'rho': 0.05}),
    'esam-history': (ESAMOptimWrapper, {'rho': 0.05, 'selection': 'history', 'refresh': 2}),
    'ausam': (AUSAMOptimWrapper, {'rho': 0.05, **OLD}),
    'ausam-reweight': (AUSAMOptimWrapper, {'rho': 0.05, 'reweight': True, 'history_momentum': 0.8, **OLD}),
    'ausam-loader': (AUSAMOptimWrapper, {'rho': 0.05, **OLD}),
    'ausam-loader-reweight': (AUSAMOptimWrapper, {'rho': 0.05, 'reweight': True, **OLD}),
    'ausam-authors': (AUSAMOptimWrapper, {'rho': 0.05, 'draw': 'sequential'}),
    'ausam-uniform': (AUSAMOptimWrapper, {'rho': 0.05, 'draw': 'uniform'}),
}
# One of every way in which a step goes: of what the base class does for all, these see what a method could break.
DISTINCT = (
    'sam',
    'looksam',
    'friendlysam',
    'gsam',
    'wsam',
    'msam',
    'esam',
    'esam-history',
    'ausam',
    'ausam-loader-reweight',
)
# Those whose only pass is at perturbed weights; they need an optimizer with momentum.
ONE_PASS = ('msam',)
TWO_PASS = tuple(name for name in WRAPPERS if name not in ONE_PASS)
DISTINCT_TWO_PASS = tuple(name for name in DISTINCT if name not in ONE_PASS)
# Options with which all samples go through both passes.
WHOLE: dict[str, dict[str, Any]] = {
    'esam': {'gamma': 1.0},
    'esam-history': {'gamma': 1.0},
    'ausam': {'sampling_ratio': 1.0},
    'ausam-reweight': {'sampling_ratio': 1.0},
    'ausam-loader': {'sampling_ratio': 1.0},
    'ausam-loader-reweight': {'sampling_ratio': 1.0},
    'ausam-authors': {'sampling_ratio': 1.0},
    'ausam-uniform': {'sampling_ratio': 1.0},
}


def forwards_in(name: str, step: int) -> int:
    """Forward passes in a step, counted from 0."""
    if name in ONE_PASS:
        return 1
    if name in ('looksam', 'sam-interval'):
        return 2 - step % 2
    if name == 'ausam-uniform' and step == 0:
        return 3  # the first one finds out which losses are sums
    return 3 if name == 'esam' or (name == 'esam-history' and step % 2 == 0) else 2


class DrawnInLoader:
    """Stands in for an ``AUSAMSampler``: every batch that arrives was drawn from one of its size over the ratio."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def take(self, keys: Keys) -> BatchDraw:
        total = round(len(keys) / self.ratio)
        share = np.linspace(0.9, 1.1, total) if total > len(keys) else np.ones(total)
        return BatchDraw(np.arange(len(keys)), share * len(keys) / total, np.full(total, np.nan))

    def state_dict(self) -> dict[str, Any]:
        return {'version': 1, 'draws': []}


def momentum_sgd(model: nn.Module, lr: float = 0.05) -> Optimizer:
    """The base optimizer of most tests."""
    return SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)


def resting_sgd(model: nn.Module) -> Optimizer:
    """An optimizer that moves nothing, and has momentum."""
    return momentum_sgd(model, lr=0.0)


def build(
    name: str, model: nn.Module, optimizer: Optimizer | None = None, *, whole: bool = False, **kwargs: Any
) -> TwoPassOptimWrapper:
    """The wrapper called ``name`` around ``model``, with ``kwargs`` on top of its own arguments.

    With ``whole`` no sample is left out, so that what it does can be compared with the base optimizer's step.
    """
    kind, own = WRAPPERS[name]
    options = {**own, **(WHOLE.get(name, {}) if whole else {}), **kwargs}
    wrapper = kind(optimizer or momentum_sgd(model), **options)
    if 'loader' in name:
        assert isinstance(wrapper, AUSAMOptimWrapper)
        wrapper.sampler = DrawnInLoader(options.get('sampling_ratio', 0.6))  # type: ignore[assignment]
    return wrapper


def constant_ausam(optimizer: Optimizer, **options: Any) -> AUSAMOptimWrapper:
    """AUSAM that draws 60 % of every batch by one range of scores."""
    return AUSAMOptimWrapper(optimizer, **{**OLD, **options})


def same_weights(name: str, left: nn.Module, right: nn.Module, tolerance: float = 1e-4) -> bool:
    """Whether all weights and buffers are equal: bit for bit, but for weighted means, which are sums of other order."""
    if not name.endswith('reweight'):
        return same_state(left, right)
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance / 100) for a, b in pairs)
