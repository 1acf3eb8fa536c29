"""No weight decay for quantizers' scales, whatever built the optimizer: it would pull a step size towards 0.

Not by ``custom_keys``, which MMPose's layer decay, for one, does not read: when a constructor has built an optimizer
for a model with quantizers, the scales that decay are moved into groups of their own, equal but for the decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import not_
from typing import Any
from weakref import WeakKeyDictionary

from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.optim import Optimizer

from mm_sharp.step.optim_wrappers import optim_wrappers

from .quantizers import SCALES

# What the groups of an optimizer were before scales were moved out of them.
_before: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def install() -> None:
    """Have MMEngine's constructors of optimizer wrappers keep scales from decay; a second call changes nothing."""
    build = OPTIM_WRAPPER_CONSTRUCTORS.build_func
    if hasattr(build, '_keeps_scales_from_decay'):
        return

    def build_func(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        constructor = build(cfg, *args, **kwargs)
        rules = ((cfg.get('paramwise_cfg') or {}).get('custom_keys') or {}).items()
        if any(rule.get('decay_mult') or rule.get('weight_decay') for key, rule in rules if SCALES in key):
            return constructor  # the config says itself that scales decay

        def construct(model: nn.Module) -> Any:
            optim_wrapper = constructor(model)
            keep_scales_from_decay(optim_wrapper, model)
            return optim_wrapper

        return construct

    build_func._keeps_scales_from_decay = True  # type: ignore[attr-defined]
    OPTIM_WRAPPER_CONSTRUCTORS.build_func = build_func


def keep_scales_from_decay(optim_wrapper: Any, model: nn.Module) -> None:
    """Take quantizers' scales out of the weight decay of an optimizer wrapper, or of those in an ``OptimWrapperDict``.

    Optimizers that share their parameters out to processes know them by their groups, and stay as they are.
    """
    scales = {id(parameter) for name, parameter in model.named_parameters() if SCALES in name}
    for member in optim_wrappers(optim_wrapper).values():
        optimizer = getattr(member, 'optimizer', None)
        if scales and isinstance(optimizer, Optimizer) and not hasattr(optimizer, 'consolidate_state_dict'):
            _move(optimizer, scales)


def fit_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Undo the moving if a state to be loaded is of the groups as they were: a run goes on as it was begun."""
    before = _before.get(optimizer)
    if before is None or _sizes(state.get('param_groups', ())) != _sizes(before):
        return
    # Not the list itself: schedulers and optimizer wrappers read it through the optimizer.
    optimizer.param_groups[len(before) :] = []
    for group, was in zip(optimizer.param_groups, before, strict=True):
        group.update(was)
    del _before[optimizer]


def _move(optimizer: Optimizer, scales: set[int]) -> None:
    moved = []
    before = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        is_scale = [id(parameter) in scales for parameter in group['params']]
        if not group.get('weight_decay') or not any(is_scale):
            continue
        if all(is_scale):
            group['weight_decay'] = 0.0
            continue
        # Some groups name their parameters.
        listed = {key: group[key] for key in ('params', 'param_names') if group.get(key)}
        chosen = {key: list(compress(values, is_scale)) for key, values in listed.items()}
        moved.append({**group, **chosen, 'weight_decay': 0.0})
        group.update({key: list(compress(values, map(not_, is_scale))) for key, values in listed.items()})
    if not moved:
        return
    for group in moved:
        optimizer.add_param_group(group)
    _before[optimizer] = before
    optimizer.register_load_state_dict_pre_hook(fit_groups)
    count = sum(_sizes(moved))
    print_log(f'{count} scales of quantizers are in parameter groups of their own, without weight decay', 'current')


def _sizes(groups: Any) -> list[int]:
    return [len(group['params']) for group in groups]
