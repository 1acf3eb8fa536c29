"""Fragments take effect when a config file is read (ours).

A config inherits a recipe and fragments, and needs no line more::

    _base_ = ['mmpose::…/recipe.py', 'mm_sharp::_base_/quantization/w4a4.py', 'mm_sharp::_base_/ausam.py']

MMEngine refuses two entries of ``_base_`` that set the same key, and every recipe sets ``model``, ``optim_wrapper`` and
``custom_hooks``. So fragments set keys of their own, which are put where they belong once the file has been read:

=======================  ===========================================================================================
``sharp_optim_wrapper``  its ``type`` and arguments go into ``optim_wrapper``, below what the recipe and the user set
``sharp_hook``           goes to ``custom_hooks`` with it
``sharp_quantization``   ``model`` becomes a ``QuantizedModel`` with its ``policy``; its ``calibration`` are the
                         arguments of a ``CalibrationHook`` in ``custom_hooks``
                         (:mod:`mm_sharp.config.quantized_config`, which also reads the key's old name)
=======================  ===========================================================================================

A config that takes a fragment over by a line of its own (``optim_wrapper = _base_.sharp_optim_wrapper``) has the last
word, and so has one that builds its ``QuantizedModel`` itself. The value None switches a key off.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from difflib import get_close_matches
from inspect import signature
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import OPTIMIZERS

from mm_sharp.config.config_types import is_type, type_name, unbuilt, written
from mm_sharp.config.quantized_config import (
    check_settings,
    has_quantized_model,
    import_quantization,
    imports_us,
    left_alone,
    merge_old_key,
    quantized,
    settings_of,
)

KEYS = ('sharp_optim_wrapper', 'sharp_hook', 'sharp_quantization')
_PREFIX = 'sharp_'
_SCALES = 'tensor_quant'
# Lines that the log has already: a tool reads a config more than once.
_said: set[str] = set()
_OURS = '_applies_fragments'
_as_written: ContextVar[bool] = ContextVar('as_written', default=False)


# -------------------------------------------------------------------- reading
def install() -> None:
    """From now on fragments take effect in every config that is read from a file; a second call changes nothing.

    ``Config.fromfile`` ends with the constructor, and obeys ``custom_imports`` before it. So the constructor is what is
    wrapped: a config whose own ``custom_imports`` are the first to import mm_sharp finds it wrapped already.
    """
    if not hasattr(Config.__init__, _OURS):
        Config.__init__ = _applying(Config.__init__)


def _applying(construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def wrapper(self: Config, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if self.filename is not None and not _as_written.get():
            apply_fragments(self)

    setattr(wrapper, _OURS, True)
    return wrapper


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, configs are read as they are written: for :func:`apply_fragments` after further changes to them."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def pending_fragments(cfg: Config) -> set[str]:
    """Those of :data:`KEYS` that :func:`apply_fragments` would put into effect."""
    keys = set()
    if _replaces(written(cfg, 'sharp_optim_wrapper'), written(cfg, 'optim_wrapper')):
        keys |= {'sharp_optim_wrapper', 'sharp_hook'}
    model = written(cfg, 'model')
    if isinstance(model, dict) and not is_type(model, 'QuantizedModel') and settings_of(cfg) is not None:
        keys.add('sharp_quantization')
    return keys


def apply_fragments(cfg: Config) -> None:
    """Put the fragments that a config inherits into effect, in place; a second call changes nothing.

    A config without our keys and without a ``QuantizedModel`` stays as it is, and so does a fragment read on its own.

    Args:
        cfg: The whole config.

    Raises:
        ValueError: A key of a fragment has a form that it cannot have, or a key begins as ours do and is none of them.
        ImportError: The config quantizes, and Brevitas is not installed.
    """
    _check_names(cfg)
    keys = pending_fragments(cfg)
    if 'sharp_optim_wrapper' in keys:
        cfg.optim_wrapper = _merged(cfg.sharp_optim_wrapper, cfg.optim_wrapper)
        if cfg.get('sharp_hook'):
            _add_hook(cfg, cfg.sharp_hook)
    if 'sharp_quantization' in keys:
        settings = settings_of(cfg)
        check_settings(cfg, settings)
        if merge_old_key(cfg):
            _say_once('quantization is the old name of sharp_quantization: it was merged into it')
        cfg.model = quantized(cfg.model, settings['policy'])
        if settings.get('calibration') is not None:
            _add_hook(cfg, {'type': 'CalibrationHook', **unbuilt(settings['calibration'])})
    if has_quantized_model(cfg):
        import_quantization(cfg)
        if isinstance(written(cfg, 'optim_wrapper'), dict):
            _keep_scales_from_decay(cfg.optim_wrapper)


# -------------------------------------------------------------------- the optimizer wrapper
def _replaces(sharp: Any, existing: Any) -> bool:
    """Whether an ``optim_wrapper`` is one of MMEngine's own two, whose arguments are known to be ours too.

    Several wrappers by name, those of other packages and ours are left as they are.
    """
    if not sharp or not isinstance(sharp, dict) or not isinstance(existing, dict) or 'optimizer' not in existing:
        return False
    return 'type' not in existing or is_type(existing, 'OptimWrapper') or is_type(existing, 'AmpOptimWrapper')


def _merged(sharp: dict[str, Any], existing: dict[str, Any]) -> dict[str, Any]:
    """The fragment's wrapper with everything that the recipe and the user have set."""
    if 'type' not in sharp:
        raise ValueError("sharp_optim_wrapper has no type: write sharp_optim_wrapper = dict(type='SAMOptimWrapper', …)")
    ours, theirs = unbuilt(deepcopy(sharp)), unbuilt(existing)
    if is_type(existing, 'AmpOptimWrapper'):
        theirs.pop('use_fsdp', None)  # ours see by the model whether it is sharded
        # Without a dtype that wrapper takes autocast's default, and it works on accelerators alone.
        theirs['dtype'] = theirs.get('dtype') or ours.get('dtype') or 'float16'
    return {**ours, **theirs, 'type': ours['type']}


def _keep_scales_from_decay(wrapper: dict[str, Any]) -> None:
    """Take the quantizers' scales out of weight decay, which would pull every step size towards 0.

    MMEngine's constructor tries the keys of ``custom_keys`` from the longest to the shortest, takes the first that is
    part of a parameter's name, and then looks at no other rule. So a longer key of the config's that names a part of
    the model ('backbone.layer4') takes that part's scales too, with its own ``decay_mult``; a shorter one ('backbone')
    loses them, with its ``lr_mult``. A config that wants something else sets the key 'tensor_quant' itself.
    """
    members = [value for value in wrapper.values() if isinstance(value, dict) and 'optimizer' in value]
    for member in [wrapper] if 'optimizer' in wrapper else members:
        paramwise = member.get('paramwise_cfg') or {}
        custom = paramwise.get('custom_keys')
        # Other constructors, which several wrappers always have, may not know custom_keys; where the config has some
        # they do.
        default = member is wrapper and is_type(member, 'DefaultOptimWrapperConstructor', 'constructor', absent=True)
        if (custom is None and not default) or _SCALES in (custom or {}):
            continue
        rule = _no_decay(member['optimizer'])
        if rule:
            member['paramwise_cfg'] = {**unbuilt(paramwise), 'custom_keys': {**unbuilt(custom or {}), _SCALES: rule}}


def _no_decay(optimizer: Any) -> dict[str, float]:
    """The entry of ``custom_keys`` that switches weight decay off; empty where there is none to switch off.

    Where nothing decays, no entry is made: with one, each parameter becomes a group of its own, and the optimizer can
    no longer work on many tensors at once.
    """
    # The constructor multiplies the config's learning rate, and fails without one.
    if not isinstance(optimizer, dict) or optimizer.get('lr') is None:
        return {}
    if optimizer.get('weight_decay') is not None:
        return {'decay_mult': 0.0} if optimizer['weight_decay'] else {}
    # MMEngine refuses decay_mult where the config leaves weight_decay to the optimizer, as AdamW's 0.01.
    kind = OPTIMIZERS.module_dict.get(type_name(optimizer, 'type').rpartition('.')[2])
    default = signature(kind).parameters.get('weight_decay') if kind is not None else None
    return {} if default is not None and not default.default else {'weight_decay': 0.0}


# -------------------------------------------------------------------- helpers
def _check_names(cfg: Config) -> None:
    """Refuse a misspelt key of ours; warn of a ``quantization`` that may be one.

    Raises:
        ValueError: A top-level key begins as ours do and is none of them.
    """
    ours = [key for key in dict.keys(cfg._cfg_dict) if str(key).startswith(_PREFIX)]
    for key in ours:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1)
            hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(KEYS)}'
            raise ValueError(f'{key} is no key of mm_sharp: {hint}')
    line = left_alone(cfg, uses_us=bool(ours) or imports_us(cfg))
    if line:
        _say_once(line, logging.WARNING)


def _say_once(line: str, level: int = logging.INFO) -> None:
    if line not in _said:
        _said.add(line)
        print_log(line, 'current', level)


def _add_hook(cfg: Config, hook: dict[str, Any]) -> None:
    """Append a hook, unless there is one of its type."""
    hooks = cfg.get('custom_hooks') or []
    kind = type_name(hook, 'type').rpartition('.')[2]
    if not any(is_type(other, kind) if isinstance(other, dict) else type(other).__name__ == kind for other in hooks):
        cfg.custom_hooks = [*hooks, deepcopy(hook)]
