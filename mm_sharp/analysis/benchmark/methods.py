"""The methods that are compared, and what arithmetic says that a step of each costs (ours).

With forward = 1 and backward = 2 (1 for the inputs' gradients, 1 for the weights'), the base optimizer's step is 3::

    SAM            2 * 3
    ESAM           1 + 1 + beta  first pass: weight gradients of a share beta of the tensors (in expectation)
                   + 1           forward of the whole batch at the perturbed weights: the selection
                   + 3 * gamma   second pass
    ESAM, history  the same without the selection, but for one step in ``refresh``
    AUSAM          2 * 3 * sampling_ratio

``gamma`` and ``sampling_ratio`` are the real shares of the batch: ceil(gamma * N) / N. Arithmetic on the weights
(climb, restoration, the optimizer's own step) counts as nothing here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from numpy.typing import NDArray

from mm_sharp.analysis.benchmark.autocast import AutocastOptimWrapper
from mm_sharp.config.preflight import check_wrappers, wrapper_class, wrapper_configs
from mm_sharp.errors import UsageError
from mm_sharp.samples.selection import sample_count


@dataclass(frozen=True)
class Method:
    """One of the methods.

    Args:
        name: As it is given on the command line.
        type: Its optimizer wrapper.
        arguments: The wrapper's arguments that make it this method; they go before the config's.
    """

    name: str
    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepLimit:
    """What a step costs by arithmetic, in steps of the base optimizer.

    Args:
        step: Most steps.
        cycle: Mean over a cycle of ``refresh`` steps, one of which costs more.
        refresh: Length of the cycle; 1 where all steps cost the same.
    """

    step: float
    cycle: float
    refresh: int = 1

    def costlier(self, steps: int, before: int) -> NDArray[np.bool_]:
        """Which of some steps refresh, and cost more than the others, (steps,): the first of every cycle.

        Args:
            steps: How many.
            before: Steps made before them.
        """
        first: NDArray[np.bool_] = (before + np.arange(steps)) % self.refresh == 0
        return first if self.refresh > 1 else np.zeros_like(first)


METHODS = {
    method.name: method
    for method in (
        Method('base', 'OptimWrapper'),
        Method('sam', 'SAMOptimWrapper'),
        Method('esam', 'ESAMOptimWrapper', {'selection': 'exact'}),
        Method('esam-history', 'ESAMOptimWrapper', {'selection': 'history'}),
        Method('ausam', 'AUSAMOptimWrapper'),
    )
}
# What every wrapper keeps of a config's; a step is a whole one, so accumulative_counts is not among them.
SHARED = ('optimizer', 'constructor', 'paramwise_cfg')
_NOT_ARGUMENTS = ('self', 'args', 'kwargs', 'optimizer', 'accumulative_counts')


def parse_methods(names: Sequence[str]) -> list[Method]:
    """The methods by name, once each, the base optimizer first: it is what the others are compared with.

    Args:
        names: Of :data:`METHODS`, or ``ausam-0.5`` for AUSAM with another ``sampling_ratio``.

    Raises:
        UsageError: There is no such method.
    """
    return [_parse_method(name) for name in dict.fromkeys(('base', *names))]


def _parse_method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    ratio = re.fullmatch(r'ausam-(\d*\.?\d+)', name)
    if ratio is None:
        close = get_close_matches(name, METHODS, n=1)
        hint = f'did you mean {close[0]!r}?' if close else ''
        raise UsageError(f'--methods {name}: there are {", ".join(METHODS)} and ausam-RATIO, as ausam-0.5; {hint}')
    if not 0 < float(ratio[1]) <= 1:
        raise UsageError(f'--methods {name}: the sampling ratio must be in (0, 1], as in ausam-0.5')
    return Method(name, METHODS['ausam'].type, {'sampling_ratio': float(ratio[1])})


def wrapper_settings(cfg: Config, method: Method, amp: str | None = None) -> dict[str, Any]:
    """The config of a method's optimizer wrapper.

    The config's own arguments are kept as far as the method has them, so the ``rho`` of a config for SAM reaches every
    sharpness-aware method. The config's precision holds for the base optimizer too.

    Args:
        cfg: The whole training config.
        method: The method.
        amp: Autocast dtype of all methods, ``'bfloat16'`` or ``'float16'``, instead of the config's precision.

    Raises:
        UsageError: The config has several optimizer wrappers, there is none of this type, or an argument is wrong.
    """
    if list(wrapper_configs(cfg)) != ['optim_wrapper']:
        raise UsageError(f'a step of several optimizer wrappers cannot be measured: {", ".join(wrapper_configs(cfg))}')
    given = dict(cfg.optim_wrapper)
    shared = {key: given[key] for key in SHARED if key in given}
    kind = wrapper_class(cfg, 'optim_wrapper', {'type': method.type})
    mixed = _precision(cfg, {**given, 'dtype': amp} if amp else given)
    own = {key: value for key, value in {**given, **mixed}.items() if key in _arguments(kind)}
    settings = {'type': method.type, **own, **method.arguments}
    if kind is OptimWrapper and mixed:
        # bfloat16 needs no loss scaling, and our wrappers do none.
        scaling = mixed['loss_scale'] if mixed['dtype'] == 'float16' else {'enabled': False}
        # MMEngine's own refuses the CPU.
        name = AutocastOptimWrapper.__name__ if get_device() == 'cpu' else 'AmpOptimWrapper'
        settings.update(type=name, dtype=mixed['dtype'], loss_scale=scaling)
    check_wrappers(Config({'default_scope': cfg.get('default_scope'), 'optim_wrapper': {**settings, **shared}}))
    return copy.deepcopy({**settings, **shared})


def _precision(cfg: Config, given: dict[str, Any]) -> dict[str, Any]:
    """``dtype`` and ``loss_scale`` that a config asks for; empty for float32."""
    dtype = given.get('dtype')
    if dtype is None and issubclass(wrapper_class(cfg, 'optim_wrapper', given), AmpOptimWrapper):
        dtype = 'float16'
    if dtype is None:
        return {}
    return {'dtype': str(dtype).removeprefix('torch.'), 'loss_scale': given.get('loss_scale', 'dynamic')}


def _arguments(kind: type[OptimWrapper]) -> dict[str, Any]:
    """The arguments of a wrapper, its bases' included, with their defaults."""
    parameters: dict[str, Parameter] = {}
    for base in reversed(kind.__mro__[:-1]):
        parameters.update(signature(base).parameters)
    return {name: parameter.default for name, parameter in parameters.items() if name not in _NOT_ARGUMENTS}


def step_limit(cfg: Config, settings: Mapping[str, Any], batch_size: int) -> StepLimit:
    """What a step costs by arithmetic, in steps of the base optimizer.

    Args:
        cfg: The whole training config, for its default scope.
        settings: Of :func:`wrapper_settings`; what it leaves out is the wrapper's default.
        batch_size: Samples in the batch.
    """
    whole = whole_settings(cfg, settings)
    return limit_of(whole['type'], whole, batch_size)


def whole_settings(cfg: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the wrapper's defaults, and the name of its class as ``type``."""
    kind = wrapper_class(cfg, 'optim_wrapper', {'type': settings['type']})
    return {**_arguments(kind), **settings, 'type': kind.__name__}


def all_settings(method: Method) -> dict[str, Any]:
    """A method's settings without a config: its arguments and its wrapper's defaults."""
    kind = OPTIM_WRAPPERS.get(method.type)
    return {**_arguments(kind), **method.arguments, 'type': method.type}


def limit_of(kind: str, settings: Mapping[str, Any], batch_size: int) -> StepLimit:
    """:func:`step_limit`, given the wrapper's class by name and all its settings."""
    if kind == 'SAMOptimWrapper':
        return StepLimit(2.0, 2.0)
    if kind == 'AUSAMOptimWrapper':
        share = sample_count(settings['sampling_ratio'], batch_size) / batch_size
        return StepLimit(2 * share, 2 * share)
    if kind != 'ESAMOptimWrapper':
        return StepLimit(1.0, 1.0)
    share = sample_count(settings['gamma'], batch_size) / batch_size
    units = 2 + settings['beta'] + 3 * share
    # Where all samples are taken, nothing is selected; and a selection by history with refresh=1 is an exact one.
    refresh = 1 if share == 1 or settings['selection'] == 'exact' else settings['refresh']
    selection = 0 if share == 1 else 1
    return StepLimit((units + (selection if refresh == 1 else 0)) / 3, (units + selection / refresh) / 3, refresh)
