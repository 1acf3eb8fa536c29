"""No weight decay for quantizers' scales, whatever built the optimizer (ours).

Decay would pull a step size towards 0, which has nothing to do with what is regularised. MMEngine's default constructor
reads ``custom_keys``, where :mod:`mm_sharp.config.fragments` asks for that; others need not (MMPose's layer decay does
not).
So, when a constructor has built an optimizer for a model with quantizers, the scales that still decay are moved into
groups of their own, equal to the ones that they come from but for the decay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.optim import Optimizer

from mm_sharp.step.optim_wrappers import optim_wrappers

_SCALES = 'tensor_quant'
# What the groups of an optimizer were before scales were moved out of them.
_before: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def install() -> None:
    """Have MMEngine's constructors of optimizer wrappers keep scales from decay; a second call changes nothing."""
    if not hasattr(OPTIM_WRAPPER_CONSTRUCTORS.build_func, '_keeps_scales_from_decay'):
        OPTIM_WRAPPER_CONSTRUCTORS.build_func = _careful(OPTIM_WRAPPER_CONSTRUCTORS.build_func)


def keep_scales_from_decay(optim_wrapper: Any, model: nn.Module) -> None:
    """Take quantizers' scales out of the weight decay of an optimizer wrapper, or of those in an ``OptimWrapperDict``.

    Optimizers that share their parameters out to processes know them by their groups, and stay as they are.
    """
    scales = _scales(model)
    for member in optim_wrappers(optim_wrapper).values():
        optimizer = getattr(member, 'optimizer', None)
        if scales and isinstance(optimizer, Optimizer) and not hasattr(optimizer, 'consolidate_state_dict'):
            _move(optimizer, scales)


def decaying_scales(optim_wrapper: Any, model: nn.Module) -> list[str]:
    """Names of the quantizers' scales that have weight decay."""
    scales = _scales(model)
    optimizers = (getattr(member, 'optimizer', None) for member in optim_wrappers(optim_wrapper).values())
    groups = [group for optimizer in optimizers for group in getattr(optimizer, 'param_groups', ())]
    return [scales[id(p)] for group in groups if group.get('weight_decay') for p in group['params'] if id(p) in scales]


def fit_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Undo the moving if a state is of the groups as they were: a run that was begun with them goes on with them.

    Args:
        optimizer: It is to load the state.
        state: Its ``state_dict``, or that of an optimizer wrapper.
    """
    before = _before.get(optimizer)
    if before is None or _sizes(state.get('param_groups', ())) != _sizes(before):
        return
    # Not the list itself: schedulers and optimizer wrappers read it through the optimizer.
    optimizer.param_groups[len(before) :] = []
    for group, was in zip(optimizer.param_groups, before, strict=True):
        group.update(was)
    del _before[optimizer]


def _careful(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_func(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        constructor = build(cfg, *args, **kwargs)
        kind = type(constructor)
        if _asks_for_decay(cfg.get('paramwise_cfg')) or hasattr(kind, '_keeps_scales_from_decay'):
            return constructor
        # `constructor(model)` looks for the method in the class, so this one instance gets a class of its own.
        own = {'__call__': _constructs, '__module__': kind.__module__, '_keeps_scales_from_decay': True}
        constructor.__class__ = type(kind.__name__, (kind,), own)
        return constructor

    build_func._keeps_scales_from_decay = True  # type: ignore[attr-defined]
    return build_func


def _constructs(self: Any, model: nn.Module) -> Any:
    optim_wrapper = super(type(self), self).__call__(model)
    keep_scales_from_decay(optim_wrapper, model)
    return optim_wrapper


def _asks_for_decay(paramwise: Any) -> bool:
    """Whether a config says itself that scales decay."""
    rules = ((paramwise or {}).get('custom_keys') or {}).items()
    return any(rule.get('decay_mult') or rule.get('weight_decay') for key, rule in rules if _SCALES in key)


def _scales(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters() if _SCALES in name}


def _move(optimizer: Optimizer, scales: Mapping[int, str]) -> None:
    moved = []
    before = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        params = group['params']
        chosen = [i for i, parameter in enumerate(params) if id(parameter) in scales]
        if not chosen or not group.get('weight_decay'):
            continue
        if len(chosen) == len(params):
            group['weight_decay'] = 0.0
            continue
        rest = [i for i in range(len(params)) if i not in set(chosen)]
        # Some groups name their parameters.
        listed = [key for key in ('params', 'param_names') if len(group.get(key) or ()) == len(params)]
        moved.append({**group, **{key: [group[key][i] for i in chosen] for key in listed}, 'weight_decay': 0.0})
        group.update({key: [group[key][i] for i in rest] for key in listed})
    if not moved:
        return
    for group in moved:
        optimizer.add_param_group(group)
    _before[optimizer] = before
    optimizer.register_load_state_dict_pre_hook(fit_groups)
    count = sum(len(group['params']) for group in moved)
    message = f'{count} scales of quantizers are in parameter groups of their own, without weight decay'
    print_log(message, logger='current', level=logging.INFO)


def _sizes(groups: Any) -> list[int]:
    return [len(group['params']) for group in groups]
