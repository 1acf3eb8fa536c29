"""The methods that are compared: the base optimizer, and every sharpness-aware wrapper in MMEngine's registry.

A method's name is its wrapper's without ``OptimWrapper``, in small letters: ``sam`` for ``SAMOptimWrapper``.
``NAME-VALUE`` sets the first argument of its own that has such a default: ``ausam-0.5`` is AUSAM with
``sampling_ratio=0.5``, ``esam-history`` ESAM with ``selection='history'``.
"""

from __future__ import annotations

import copy
import math
from ast import literal_eval
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from mm_sharp.config.preflight import check_wrappers, wrapper_class, wrapper_configs
from mm_sharp.errors import UsageError, arguments_of, closest, is_number
from mm_sharp.step.method import Cost
from mm_sharp.step.wrapper import TwoPassOptimWrapper, registered_methods

# What every wrapper keeps of a config's; a step is a whole one, so accumulative_counts is not among them.
SHARED = ('optimizer', 'constructor', 'paramwise_cfg')


def all_methods() -> dict[str, str]:
    """The wrapper of the base optimizer and every registered sharpness-aware one, by name; the costliest first."""
    kinds = registered_methods()
    ordered = sorted(kinds, key=lambda name: -kinds[name].theoretical_cost(32).cycle)
    return {'base': 'OptimWrapper', **{kind.removesuffix('OptimWrapper').lower(): kind for kind in ordered}}


def parse_methods(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Type and arguments of each method's wrapper, by name, the base optimizer's first; a UsageError for others."""
    return {name: _parse_method(name) for name in ('base', *names)}


def _parse_method(name: str) -> dict[str, Any]:
    kinds = all_methods()
    if name in kinds:
        return {'type': kinds[name]}
    stem, _, text = name.partition('-')
    if stem in kinds and text:
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        kind = OPTIM_WRAPPERS.get(kinds[stem])
        choices = getattr(kind, 'choices', {})
        for argument, parameter in signature(kind).parameters.items():
            own, default = argument not in arguments_of(TwoPassOptimWrapper), parameter.default
            fits = type(default) is str if isinstance(value, str) else is_number(default)
            if own and fits and value in choices.get(argument, (value,)):
                return {'type': kinds[stem], argument: value}
    hint = f'; did you mean {close!r}?' if (close := closest(name, kinds)) else ''
    raise UsageError(f'--methods {name}: there are {", ".join(kinds)}, and NAME-VALUE, as ausam-0.5{hint}')


def wrapper_settings(cfg: Config, method: Mapping[str, Any], amp: str | None = None) -> dict[str, Any]:
    """The config of a method's optimizer wrapper.

    The whole config's own arguments are kept as far as the method has them and does not set them, so the ``rho`` of a
    config for SAM reaches every sharpness-aware method. Its precision, or ``amp``, holds for the base optimizer too: in
    float16 by ``AmpOptimWrapper``, in bfloat16, which needs no loss scaling, by ``dtype`` of a plain ``OptimWrapper``.

    Raises UsageError: The config has several optimizer wrappers, there is none of this type, or an argument is wrong.
    """
    if list(wrapper_configs(cfg)) != ['optim_wrapper']:
        raise UsageError(f'a step of several optimizer wrappers cannot be measured: {", ".join(wrapper_configs(cfg))}')
    given, kind = dict(cfg.optim_wrapper), method['type']
    dtype = amp or given.get('dtype')
    if dtype is None and issubclass(wrapper_class(cfg, 'optim_wrapper', given), AmpOptimWrapper):
        dtype = 'float16'
    if dtype is not None:
        given['dtype'] = dtype = str(dtype).removeprefix('torch.')
        kind = 'AmpOptimWrapper' if (kind, dtype) == ('OptimWrapper', 'float16') else kind
    known = {*arguments_of(OPTIM_WRAPPERS.get(kind)), *SHARED} - {'accumulative_counts'}
    kept = {key: value for key, value in given.items() if key in known}
    settings = copy.deepcopy({**kept, **method, 'type': kind})
    check_wrappers(Config({'default_scope': cfg.get('default_scope'), 'optim_wrapper': settings}))
    return settings if dtype is None else {**settings, 'dtype': dtype}


def theoretical_cost(settings: Mapping[str, Any], batch_size: int) -> Cost:
    """What a step costs in theory, given its wrapper's config, in steps of the base optimizer."""
    kind = OPTIM_WRAPPERS.get(settings['type'])
    return kind.theoretical_cost(batch_size, **settings) if issubclass(kind, TwoPassOptimWrapper) else Cost(1.0, 1.0)


def whole_cycles(rounds: int, costs: Mapping[str, Cost]) -> int:
    """At least so many rounds, in which every method's cycles are whole."""
    cycles = math.lcm(*(cost.length for cost in costs.values()))
    return -(-rounds // cycles) * cycles
