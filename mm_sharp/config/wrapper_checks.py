"""Checks of an optimizer wrapper's config: its arguments, optimizer and ``paramwise_cfg`` (ours).

What MMEngine would refuse as well, it refuses for every wrapper; what MMEngine passes over in silence, for ours alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from copy import deepcopy
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, Registry
from torch import nn

from mm_sharp.errors import UsageError, is_number
from mm_sharp.methods.ausam import AUSAMOptimWrapper
from mm_sharp.methods.esam import ESAMOptimWrapper
from mm_sharp.methods.sam import SAMOptimWrapper
from mm_sharp.step.wrapper import TwoPassOptimWrapper

_OURS = (SAMOptimWrapper, ESAMOptimWrapper, AUSAMOptimWrapper)
_SGD = "optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"
_PARAMWISE = 'paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys=dict(backbone=dict(lr_mult=0.1)))'
_FLAGS = {'bypass_duplicate'}
_FACTORS = {
    *('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult'),
    'dcn_offset_lr_mult',
}


def arguments_of(cls: type) -> dict[str, Parameter]:
    """The named arguments of a class's constructor, those that its ``**kwargs`` hand on to its bases included."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__[:-1]:
        if '__init__' not in vars(base):
            continue
        parameters = dict(list(signature(base.__init__).parameters.items())[1:])  # type: ignore[misc]
        plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        found = {**plain, **found}
        if len(plain) == len(parameters):
            break
    return found


def did_you_mean(name: str, names: Collection[str]) -> str:
    """The names that there are, after the one that was meant, if that can be guessed."""
    close = closest(name, names)
    return (f'did you mean {close!r}? ' if close else '') + f'there are {", ".join(sorted(names))}'


def closest(name: str, names: Collection[str]) -> str | None:
    """The name that was meant, if that can be guessed; capitals do not count."""
    lower = {other.lower(): other for other in names}
    found = get_close_matches(name.lower(), lower, n=1)
    return lower[found[0]] if found else None


def wrapper_configs(cfg: Config) -> dict[str, Any]:
    """The config of each optimizer wrapper by its dotted key: one, or several for an ``OptimWrapperDict``.

    Raises:
        UsageError: There is none.
    """
    top = cfg.get('optim_wrapper')
    example = "write optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01))"
    if not top:
        raise UsageError(f'the config has no optim_wrapper: {example}')
    if not isinstance(top, dict):
        raise UsageError(f'optim_wrapper={top!r} is no dict: {example}')
    if 'optimizer' in top or 'type' in top:
        return {'optim_wrapper': top}
    dicts = {f'optim_wrapper.{key}': value for key, value in top.items() if isinstance(value, dict)}
    members = {key: value for key, value in dicts.items() if 'optimizer' in value or 'type' in value}
    if not members:
        raise UsageError(f'optim_wrapper has neither a type nor an optimizer: {example}')
    if 'constructor' not in top:
        raise UsageError(
            f"optim_wrapper.constructor is missing, and {', '.join(members)} need one: MMEngine's own builds a single "
            "wrapper. Write optim_wrapper = dict(constructor='MyConstructor', …), or, for one wrapper of all "
            "parameters, optim_wrapper = dict(type='SAMOptimWrapper', optimizer=…)"
        )
    return members


def wrapper_class(cfg: Config, key: str, wrapper: dict[str, Any]) -> type[OptimWrapper]:
    """The class that MMEngine will build for an optimizer wrapper's config.

    Raises:
        UsageError: Its type is not registered.
    """
    name = wrapper.get('type', 'OptimWrapper')
    if not isinstance(name, str):
        return name  # type: ignore[no-any-return]
    scope = wrapper.get('_scope_') or cfg.get('default_scope', 'mmengine')
    with OPTIM_WRAPPERS.switch_scope_and_registry(scope) as registry:
        found = registry.get(name)
        names = sorted({*registry.module_dict, *OPTIM_WRAPPERS.module_dict})
    if found is None:
        close = closest(name, names)
        hint = f'did you mean {close!r}?' if close else 'import its module in custom_imports.'
        raise UsageError(f'{key}.type: no optimizer wrapper {name!r}; {hint} Registered: {", ".join(names)}')
    return found  # type: ignore[no-any-return]


def check_arguments(key: str, cls: type[OptimWrapper], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a wrapper of ours has not, and say whose they are.

    Raises:
        UsageError: There is one.
    """
    known = arguments_of(cls)
    unknown = [name for name in arguments if name not in known]
    if not unknown or not issubclass(cls, TwoPassOptimWrapper):
        return
    name, kind = unknown[0], cls.__name__
    owners = [other.__name__ for other in _OURS if name in arguments_of(other)]
    message = f'{key}.{name}: {kind} has no such argument'
    if owners:
        example = f"{key} = dict(type='{owners[0]}', {name}={arguments[name]!r}, …)"
        raise UsageError(f'{message}, {owners[0]} has: take it out, or write {example}')
    if name in arguments_of(AmpOptimWrapper):
        example = f"{key} = dict(type='{kind}', dtype='float16', loss_scale='dynamic', …)"
        raise UsageError(f"{message}, which is MMEngine's AmpOptimWrapper's: take it out, as in {example}")
    own = set(known) - {'optimizer'}
    raise UsageError(
        f"{message}; {did_you_mean(name, own)}. Write for example: {key} = dict(type='{kind}', rho=0.05, …)"
    )


def check_optimizer(
    cfg: Config, key: str, cls: type[OptimWrapper], wrapper: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the config's optimizer around a single number; of another package's, check the type and arguments only.

    Returns:
        It, or an SGD in place of another package's.

    Raises:
        UsageError: There is none, or its type or an argument is wrong.
    """
    config, written = wrapper.get('optimizer'), f"{key} = dict(type='{cls.__name__}', {_SGD}, …)"
    stand_in = torch.optim.SGD([_weight()], lr=1.0)
    if isinstance(config, torch.optim.Optimizer):
        return stand_in
    if not isinstance(config, Mapping) or not config.get('type'):
        what = 'missing' if config is None else f'{config!r}, which is no dict with a type'
        raise UsageError(f'{key}.optimizer is {what}. Write for example: {written}')
    kind = registered(cfg, OPTIMIZERS, config['type'], config.get('_scope_'))
    if kind is None:
        names = [name for name in OPTIMIZERS.module_dict if name != 'Optimizer']
        hint = did_you_mean(str(config['type']), names)
        raise UsageError(f'{key}.optimizer.type: no optimizer {config["type"]!r}; {hint}. Write for example: {written}')
    arguments = {name: deepcopy(value) for name, value in config.items() if name not in ('type', '_scope_')}
    try:
        signature(kind).bind([_weight()], **arguments)
        return kind([_weight()], **arguments) if kind.__module__.startswith('torch.') else stand_in
    except (TypeError, ValueError) as error:
        takes = ', '.join(str(p).partition(':')[0] for p in list(signature(kind).parameters.values())[1:])
        what = f'{key}.optimizer={dict(config)!r}: {kind.__name__}: {error}. It takes {takes}'
        raise UsageError(f'{what}. Write for example: {written}') from error


def check_paramwise(cfg: Config, key: str, cls: type[OptimWrapper], wrapper: Mapping[str, Any]) -> None:
    """Check ``paramwise_cfg``, if it is for MMEngine's default constructor.

    Raises:
        UsageError: ``paramwise_cfg`` is not what it takes.
    """
    paramwise = wrapper.get('paramwise_cfg')
    if check_constructor(cfg, wrapper) is not DefaultOptimWrapperConstructor or not paramwise:
        return
    try:
        config = {'type': cls.__name__, 'optimizer': dict(wrapper['optimizer'])}
        DefaultOptimWrapperConstructor(config, deepcopy(paramwise))
        if issubclass(cls, TwoPassOptimWrapper):
            _check_paramwise_keys(paramwise)
    except (TypeError, ValueError) as error:
        reason = str(error)
        if 'base_wd' in reason:
            reason = f'its factors of weight decay need one in the optimizer: write {_SGD[:-1]}, weight_decay=1e-4)'
        raise UsageError(f'{key}.paramwise_cfg={paramwise!r}: {reason}. Write for example: {_PARAMWISE}') from error


def check_constructor(cfg: Config, wrapper: Mapping[str, Any]) -> Any:
    """The class that puts the whole ``optim_wrapper`` together.

    Raises:
        UsageError: It is not registered.
    """
    kind = wrapper.get('constructor', DefaultOptimWrapperConstructor)
    found = registered(cfg, OPTIM_WRAPPER_CONSTRUCTORS, kind)
    if found is None:
        hint = did_you_mean(str(kind), OPTIM_WRAPPER_CONSTRUCTORS.module_dict)
        raise UsageError(
            f'optim_wrapper.constructor: no constructor {kind!r}; {hint}. Take it out for the default one, or import '
            "its module: custom_imports = dict(imports=['my_module'])"
        )
    return found


def registered(cfg: Config, registry: Registry, kind: Any, scope: str | None = None) -> Any:
    """The class that MMEngine finds for a ``type``; None if it finds none."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(scope or cfg.get('default_scope', 'mmengine')) as found:
        return found.get(kind)


def _check_paramwise_keys(paramwise: Mapping[str, Any]) -> None:
    """What the default constructor passes over, or meets only where a rule applies."""
    unknown = [name for name in paramwise if name not in {*_FACTORS, *_FLAGS, 'custom_keys'}]
    if unknown:
        raise ValueError(f'no key {unknown[0]!r}; {did_you_mean(unknown[0], {*_FACTORS, *_FLAGS, "custom_keys"})}')
    wrong = [f'{name}={value!r}' for name, value in paramwise.items() if name in _FACTORS and not is_number(value)]
    for name, rule in (paramwise.get('custom_keys') or {}).items():
        if not isinstance(rule, Mapping):
            raise ValueError(f'custom_keys.{name}={rule!r} must be a dict')
        wrong += [f'{name}.{k}={v!r}' for k, v in rule.items() if k in ('lr_mult', 'decay_mult') and not is_number(v)]
    if wrong:
        raise ValueError(f'{wrong[0]} must be a number')


def _weight() -> nn.Parameter:
    """A parameter on the device that training will use, since what AMP allows depends on it."""
    device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if get_device() == 'cuda' else 'cpu'
    return nn.Parameter(torch.zeros(1, 1, device=device))  # a matrix: some optimizers (Muon) take nothing else
