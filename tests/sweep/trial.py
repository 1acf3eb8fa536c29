"""One model trained for some steps by the base optimizer and by a method at rho = 0: are they the same, bit for bit?"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn

from mm_sharp.compat import MissingOperatorError
from mm_sharp.ops import rare_changes
from tests.sweep.batches import Batch, make_batch
from tests.sweep.recipes import Recipe, made_shallow

STEPS = 2
LARGEST = 250_000_000  # weights
METHODS: dict[str, dict[str, Any]] = {
    'SAM': {'type': 'SAMOptimWrapper', 'rho': 0.0},
    'ESAM': {'type': 'ESAMOptimWrapper', 'rho': 0.0, 'beta': 1.0, 'gamma': 1.0},
    'AUSAM': {'type': 'AUSAMOptimWrapper', 'rho': 0.0, 'sampling_ratio': 1.0},
}
OPTIMIZER = {'type': 'SGD', 'lr': 1e-5, 'momentum': 0.9}
# Ways to make a model quick, the quickest first: whether it is made shallow, and the pictures' size.
ATTEMPTS: dict[str, tuple[tuple[bool, int | None], ...]] = {
    'mmpretrain': ((True, 64), (False, 64), (True, None), (False, None)),
    'mmdet': ((True, 64), (False, 64), (True, 128), (False, 320)),
    'mmpose': ((True, 128), (False, None)),
}

State = dict[str, Any]


def trial(recipe: Recipe, methods: Sequence[str] = ('SAM',)) -> dict[str, Any]:
    """What became of one recipe; to be called in a process of its own, since it changes classes.

    Returns:
        ``'error'`` where the base optimizer cannot train the model here; otherwise, for each method, ``'equal'``, or a
        text that says what differs.
    """
    began = time.process_time()
    errors = []
    scope = recipe.config().get('default_scope', recipe.package)
    init_default_scope(scope)
    for shallow, size in ATTEMPTS[scope]:
        cfg = recipe.config()
        with made_shallow(cfg.model) if shallow else nullcontext():
            try:
                model, batch = _ready(scope, cfg, size)
                base = run(model, batch, {'type': 'OptimWrapper'})
                if not base['finite']:
                    raise ValueError('the base optimizer diverges')
            except MissingOperatorError as error:
                return {'error': _line(error)}
            except Exception as error:
                errors.append(_line(error))
                continue
            found: dict[str, Any] = {'shallow': shallow, 'size': size, 'loss': base['log'][0], 'errors': errors}
            for method in methods:
                found[method] = _compare(model, batch, base, method)
        return {**found, 'seconds': round(time.process_time() - began, 1)}
    return {'error': errors[-1], 'errors': errors}  # the last is of the config as it is


def _ready(scope: str, cfg: Config, size: int | None) -> tuple[nn.Module, Batch]:
    """A config's model with its initial weights, and a batch."""
    problem = None
    seed()
    try:
        batch = make_batch(scope, cfg, size)
    except Exception as error:
        problem = error
    seed()
    model = MODELS.build(cfg.model)  # first, for a package that is missing says more than a batch that is
    if problem is not None:
        raise problem
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > LARGEST:
        raise ValueError(f'too large: {weights / 1e6:.0f} million weights')
    model.init_weights()
    model.train()  # which may return nothing
    return model, batch


def _compare(model: nn.Module, batch: Batch, base: State, method: str) -> str:
    """``'equal'``, or what differs or went wrong."""
    try:
        found = differences(base, run(model, batch, METHODS[method]))
    except Exception as error:
        return _line(error)
    if found and differences(base, run(model, batch, {'type': 'OptimWrapper'})):
        return f'the base optimizer itself differs from run to run: {found}'
    return found or 'equal'


def _line(error: Exception) -> str:
    lines = [' '.join(line.split()) for line in str(error).strip().splitlines()] or ['(no message)']
    return f'{type(error).__name__}: ' + ' … '.join(lines[:1] + lines[1:][-1:])


def seed() -> None:
    """Start all generators."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def run(start: nn.Module, batch: Batch, wrapper: Mapping[str, Any]) -> State:
    """Train a copy for some steps, and give all that a step can change."""
    model = copy.deepcopy(start)
    optim = build_optim_wrapper(model, {**wrapper, 'optimizer': dict(OPTIMIZER)})
    hub = MessageHub.get_current_instance()
    seed()
    log, batches = [], []
    # The first step has copies of all that hardly any forward changes, the second goes by what the first has seen.
    with patch.object(rare_changes, '_ALL_UP_TO', 1):
        for step in range(STEPS):
            hub.update_info_dict({'epoch': 0, 'max_epochs': 10, 'iter': step, 'max_iters': 100})
            data = copy.deepcopy(batch)
            log.append({name: float(value) for name, value in model.train_step(data, optim).items()})
            batches.append(data)
    return {
        'model': dict(state_of(model)),
        'finite': all(bool(value.isfinite().all()) for value in model.parameters()),
        'log': log,
        'batch': batches,
        'optimizer': optim.optimizer.state_dict(),
        'random': (torch.get_rng_state(), np.random.get_state(), random.getstate()),
    }


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers and all other tensors and numbers among the attributes of a model's modules."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_parameters', '_buffers') or isinstance(value, _KEPT):
                yield f'{name}.{key}', value


_KEPT = (torch.Tensor, np.ndarray, bool, int, float, list, tuple)


def differences(one: Any, other: Any) -> str:
    """What differs between two nested values: the first five places and their number; empty for none."""
    found = list(_differences(one, other, ''))
    places = '; '.join(found[:5])
    return f'{places}; {len(found)} in all' if len(found) > 5 else places


def _differences(one: Any, other: Any, place: str) -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        one, other = one.detach(), other.detach()
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f'{place}: another shape or dtype'
        elif not torch.equal(one, other) and not _same_bits(one, other):
            yield f'{place}: {(one.double() - other.double()).abs().max():.1e} of {one.double().abs().max():.1e}'
    elif isinstance(one, BaseDataElement) and isinstance(other, BaseDataElement):
        yield from _differences(dict(one.all_items()), dict(other.all_items()), place)
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            yield f'{place}: keys {sorted(set(map(str, one)) ^ set(map(str, other)))}'
        for key in one:
            if key in other:
                yield from _differences(one[key], other[key], f'{place}.{key}'.lstrip('.'))
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield f'{place}: another length'
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _differences(a, b, f'{place}.{number}')
    elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.tobytes() != other.tobytes():
            yield place
    elif isinstance(one, (bool, int, float, str)) and repr(one) != repr(other):
        yield f'{place}: {one} and {other}'


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also where there is NaN."""
    return one.numpy().tobytes() == other.numpy().tobytes()
