"""A wrapper's part of a checkpoint: plain types and tensors only; and whether one is of the optimizer that loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import UserError, some
from mm_sharp.ops.parameters import devices_of
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rng import RandomState

_KEY = 'mm_sharp'
_KEPT = 'mm_sharp_kept'
_VERSION = 1
OTHERWISE = 'use the config that it was trained with, or start from its weights: load_from=…, without --resume'


def pack_state(
    owner: str, state: dict[str, Any], optimizer: Optimizer, precision: Precision, method_state: Mapping[str, Any]
) -> dict[str, Any]:
    """Add the loss scaler's state and our own, with what the method adds, to what ``OptimWrapper.state_dict`` gave.

    They are ``'loss_scaler'`` (float16 only, as MMEngine names it) and ``'mm_sharp'``. A plain ``OptimWrapper`` ignores
    both. The random state is that of this process, and is left out where there are several: only rank 0 writes
    checkpoints.
    """
    packed = dict(state)
    if precision.scaler is not None:
        packed['loss_scaler'] = precision.scaler.state_dict()
    own: dict[str, Any] = {'version': _VERSION, 'wrapper': owner, 'base_optimizer': type(optimizer).__name__}
    if get_world_size() == 1:
        own['random_state'] = RandomState.capture(devices_of(optimizer)).state_dict()
    packed[_KEY] = {**own, **method_state}
    return packed


def unpack_state(
    owner: str, state: dict[str, Any], optimizer: Optimizer, precision: Precision
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Load our part of ``state``, which :func:`pack_state` gave or MMEngine's own wrappers, and is not changed.

    Returns the rest, for ``OptimWrapper.load_state_dict``, and the method's state. Nothing is loaded, but a UserError
    raised, if the state is of another wrapper of ours, of another base optimizer, of other parameters, or its version
    is newer than this package's.
    """
    rest = dict(state)
    own, scaler_state = rest.pop(_KEY, None), rest.pop('loss_scaler', None)
    _check(owner, own)
    check_base_optimizer(optimizer, state)
    if own is None:
        message = f'The checkpoint holds no state of mm_sharp: {owner} starts with its own anew'
        print_log(message, logger='current', level=logging.WARNING)
    if precision.scaler is not None and scaler_state:
        precision.scaler.load_state_dict(scaler_state)
    elif precision.scaler is not None:
        message = 'The checkpoint holds no loss scale: dynamic scaling starts anew'
        print_log(message, logger='current', level=logging.WARNING)
    if own is not None and 'random_state' in own and get_world_size() == 1:
        RandomState.from_state_dict(own['random_state']).restore()
    return rest, own or {}


def with_kept(state: dict[str, Any], optimizer: Optimizer, kept: Mapping[nn.Parameter, Tensor]) -> dict[str, Any]:
    """Add what a method keeps of each parameter to the base optimizer's state of it, which FSDP saves by pieces."""
    if not kept:
        return state
    states = dict(state['state'])
    for number, parameter in enumerate(_in_order(optimizer)):
        if parameter in kept:
            states[number] = {**states.get(number, {}), _KEPT: kept[parameter]}
    return {**state, 'state': states}


def without_kept(state: dict[str, Any], optimizer: Optimizer) -> tuple[dict[str, Any], dict[nn.Parameter, Tensor]]:
    """The inverse of :func:`with_kept`: the base optimizer's state, and what the method keeps."""
    states: dict[Any, dict[str, Any]] = state.get('state', {})
    if not any(_KEPT in each for each in states.values()):
        return state, {}
    parameters = _in_order(optimizer)
    kept = {parameters[n]: each[_KEPT].to(parameters[n].device) for n, each in states.items() if _KEPT in each}
    rest = {number: {name: v for name, v in each.items() if name != _KEPT} for number, each in states.items()}
    return {**state, 'state': {number: each for number, each in rest.items() if each}}, kept


def _in_order(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters as an optimizer's state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group['params']]


def check_base_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise unless the state of an ``OptimWrapper`` is of the same kind of optimizer and of as many parameters.

    Ours names the base optimizer; in MMEngine's it shows in the hyperparameters.
    """
    name = type(optimizer).__name__
    groups = state.get('param_groups')
    if not isinstance(groups, list) or not isinstance(state.get('state'), Mapping):
        raise UserError(f"the checkpoint's optimizer state is damaged: it lacks state or param_groups. {OTHERWISE}")
    saved = (state.get('mm_sharp') or {}).get('base_optimizer', name)
    # Flags are left out: newer versions of torch add some, and do without.
    needed = {key for key, value in optimizer.defaults.items() if value is not None and not isinstance(value, bool)}
    lacking = sorted({key for group in groups for key in needed - group.keys()})
    if saved != name or lacking:
        found = f'of {saved}' if saved != name else f'of another optimizer (it has no {some(lacking)})'
        raise UserError(f"the checkpoint's optimizer state is {found}, and the config has {name}: {OTHERWISE}")
    sizes = [[len(group['params']) for group in side] for side in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the checkpoint's optimizer state is of {sum(sizes[0])} parameters in {len(sizes[0])} groups, and the "
            f'config makes {sum(sizes[1])} in {len(sizes[1])} (model, paramwise_cfg): {OTHERWISE}'
        )


def _check(name: str, own: Any) -> None:
    """Refuse the state of another wrapper or of a newer version."""
    if own is None:
        return
    if not isinstance(own, Mapping) or not {'version', 'wrapper'} <= own.keys():
        raise UserError(
            "the checkpoint's optimizer state is damaged: 'mm_sharp' must be a dict with version and wrapper"
        )
    if own['version'] > _VERSION:
        raise UserError(
            f"the checkpoint's optimizer state has version {own['version']}, and this mm_sharp reads up to {_VERSION}: "
            'install the mm_sharp that wrote it, or a newer one'
        )
    if own['wrapper'] != name:
        raise UserError(
            f'the checkpoint was written by {own["wrapper"]}, and the config has {name}: to go on with it, write '
            f"optim_wrapper = dict(type='{own['wrapper']}', …); to start from its weights with {name}, write "
            'load_from=… and leave out --resume'
        )
