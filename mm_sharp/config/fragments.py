"""Fragments take effect when a config file is read (``_base_ = ['recipe.py', 'mm_sharp::_base_/sam.py']``).

MMEngine refuses two entries of ``_base_`` that set the same key. So fragments set keys of their own, which are moved
once the file has been read: ``sharp_optim_wrapper`` goes into ``optim_wrapper``, below what the recipe and the user
set, and ``sharp_hook`` to ``custom_hooks`` with it; by ``sharp_quantization`` ``model`` becomes a ``QuantizedModel``
with its ``policy``, with a ``CalibrationHook`` of its ``calibration``. A config that builds these itself has the last
word; None switches a key off. There is no Brevitas in this file: configs must be readable without it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.logging import print_log

from mm_sharp.compat import is_ours
from mm_sharp.errors import UserError, did_you_mean

KEYS = ('sharp_optim_wrapper', 'sharp_hook', 'sharp_quantization')
_PACKAGE = 'mm_sharp.quantization'
_EXAMPLE = (
    'sharp_quantization = dict(policy=dict(weight_bit_width=4, act_bit_width=4), calibration=dict(num_batches=16))'
)
_as_written: ContextVar[bool] = ContextVar('as_written', default=False)


def install() -> None:
    """From now on fragments take effect in every config that is read from a file; a second call changes nothing.

    ``Config.fromfile`` ends with the constructor, after ``custom_imports``, which may be the first to import mm_sharp.
    """
    construct = Config.__init__
    if hasattr(construct, '_applies_fragments'):
        return

    @functools.wraps(construct)
    def wrapper(self: Config, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if self.filename is not None and not _as_written.get():
            apply_fragments(self)
            _refuse_amp(self)

    wrapper._applies_fragments = True  # type: ignore[attr-defined]
    Config.__init__ = wrapper


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
    sharp, existing, model = (_written(cfg, key) for key in ('sharp_optim_wrapper', 'optim_wrapper', 'model'))
    if sharp and isinstance(sharp, dict) and isinstance(existing, dict) and 'optimizer' in existing:
        # It takes the place of MMEngine's two wrappers, whose arguments are ours too.
        replaceable = {'type': 'OptimWrapper', **_unbuilt(existing)}
        if _is_type(replaceable, 'OptimWrapper') or _is_type(existing, 'AmpOptimWrapper'):
            keys |= {'sharp_optim_wrapper', 'sharp_hook'}
    if isinstance(model, dict) and not _is_type(model, 'QuantizedModel') and _written(cfg, KEYS[2]) is not None:
        keys.add('sharp_quantization')
    return keys


def apply_fragments(cfg: Config) -> None:
    """Put the fragments that a config inherits into effect, in place; a second call changes nothing.

    A ValueError: a key of ours is misspelt, or has a wrong value; an ImportError: Brevitas, which it needs, is missing.
    """
    _check_keys(cfg)
    keys, settings = pending_fragments(cfg), _written(cfg, 'sharp_quantization')
    if 'sharp_optim_wrapper' in keys:
        cfg.optim_wrapper = _merged(cfg.sharp_optim_wrapper, cfg.optim_wrapper)
        if cfg.get('sharp_hook'):
            _add_hook(cfg, cfg.sharp_hook)
    if 'sharp_quantization' in keys:
        _check_quantization(settings)
        cfg.model = _quantized(cfg.model, settings['policy'])
        if settings.get('calibration') is not None:
            _add_hook(cfg, {'type': 'CalibrationHook', **_unbuilt(settings['calibration'])})
    if settings is not None and isinstance(_written(cfg, 'model'), dict):
        _import_quantization(cfg)


def _merged(sharp: dict[str, Any], existing: dict[str, Any]) -> dict[str, Any]:
    """The fragment's wrapper with everything that the recipe and the user have set."""
    if 'type' not in sharp:
        raise ValueError("sharp_optim_wrapper has no type: write sharp_optim_wrapper = dict(type='SAMOptimWrapper', …)")
    ours, theirs = _unbuilt(deepcopy(sharp)), _unbuilt(existing)
    if _is_type(existing, 'AmpOptimWrapper'):
        theirs.pop('use_fsdp', None)  # ours see by the model whether it is sharded
        # Without a dtype that wrapper takes autocast's default, and it works on accelerators alone.
        theirs['dtype'] = theirs.get('dtype') or ours.get('dtype') or 'float16'
    return {**ours, **theirs, 'type': ours['type']}


def _quantized(model: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    """The config of a quantized model, in which only the float model's class becomes ``model``.

    Its arguments stay where they were: programs read and set ``cfg.model.head``, as MMPose's ``init_model`` does.
    """
    arguments = _unbuilt(model)
    inner: Any = model
    if not {'model', 'policy'}.isdisjoint(arguments):
        arguments = {}  # it has arguments of its own by these names
    elif 'type' in arguments:
        kind = arguments.pop('type')
        inner = kind if isinstance(kind, str) else ConfigDict(type=kind)
    return {**arguments, 'type': 'QuantizedModel', 'model': inner, 'policy': deepcopy(policy)}


def _add_hook(cfg: Config, hook: dict[str, Any]) -> None:
    hooks, kind = cfg.get('custom_hooks') or [], _type_name(hook).rpartition('.')[2]
    others = [*hooks, *(cfg.get('default_hooks') or {}).values()]
    if not any(_is_type(other, kind) if isinstance(other, dict) else type(other).__name__ == kind for other in others):
        cfg.custom_hooks = [*hooks, deepcopy(hook)]


def _import_quantization(cfg: Config) -> None:
    """Import what registers ``QuantizedModel``, now and wherever a copy of the config is read."""
    imports = imports_of(cfg)
    if _PACKAGE not in imports:
        entry = _unbuilt(_written(cfg, 'custom_imports') or {'allow_failed_imports': False})
        cfg.custom_imports = {**entry, 'imports': [*imports, _PACKAGE]}
    importlib.import_module(_PACKAGE)  # where Brevitas is missing, its error says how to install it


def _check_keys(cfg: Config) -> None:
    """Refuse a misspelt key of ours, and the name that ``sharp_quantization`` had once."""
    for key in dict.keys(cfg._cfg_dict):
        if str(key).startswith('sharp_') and key not in KEYS:
            raise ValueError(f'{key} is no key of mm_sharp: {did_you_mean(key, KEYS)}')
    old = _written(cfg, 'quantization')  # other projects have this key too: theirs is left alone
    if isinstance(old, dict) and any(isinstance(old.get(part), dict) for part in ('policy', 'calibration')):
        if 'sharp_quantization' in cfg._cfg_dict:
            raise ValueError(f'quantization = {old!r}: the key is sharp_quantization now. Write {_EXAMPLE}')
        if any(str(name).startswith('mm_sharp') for name in imports_of(cfg)):
            line = f'quantization = {old!r} is not read by mm_sharp: to quantize the model, write {_EXAMPLE}'
            print_log(line, 'current', logging.WARNING)


def _refuse_amp(cfg: Config) -> None:
    """Say what to write in place of ``--amp``, which MMPose's own ``tools/train.py`` is about to refuse."""
    wrapper = _written(cfg, 'optim_wrapper')
    # Other programs may have an option of this name that works.
    if '--amp' in sys.argv and hasattr(sys.modules['__main__'], 'merge_args') and is_ours(wrapper):
        raise UserError(
            f"--amp is for MMEngine's OptimWrapper alone, and optim_wrapper.type={_type_name(wrapper)!r} takes a dtype "
            f'instead: leave --amp out, and write optim_wrapper = dict(type={_type_name(wrapper)!r}, '
            "dtype='float16', ...), or on the CPU dtype='bfloat16'"
        )


def _check_quantization(settings: Any) -> None:
    forms: dict[str, Any] = {'policy': dict, 'calibration': (dict, type(None))}
    is_right = isinstance(settings, dict) and set(settings) <= set(forms)
    if not is_right or not all(isinstance(settings.get(part), kinds) for part, kinds in forms.items()):
        allowed = 'a dict with a dict called policy and, if wanted, one called calibration'
        raise ValueError(f'sharp_quantization={settings!r} is not allowed: it must be {allowed}. Write {_EXAMPLE}')


def _written(cfg: Config, key: str) -> Any:
    """A top-level value, or None. New-style configs import lazily, and a value once built cannot be written out."""
    return dict.get(cfg._cfg_dict, key)


def _unbuilt(config: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy, in which lazy imports stay what they are."""
    return dict(dict.items(config))


def imports_of(cfg: Config) -> list[Any]:
    """What ``custom_imports`` names."""
    imports = (_written(cfg, 'custom_imports') or {}).get('imports') or []
    return [imports] if isinstance(imports, str) else list(imports)


def _type_name(config: dict[str, Any]) -> str:
    """A ``type`` as text: in new-style configs it is an import that was not made yet, or a class."""
    kind = dict.get(config, 'type')
    if isinstance(kind, (LazyAttr, LazyObject)):
        return f'{kind.module}.{kind}'
    return f'{kind.__module__}.{kind.__qualname__}' if isinstance(kind, type) else str(kind)


def _is_type(config: dict[str, Any], name: str) -> bool:
    """Whether a ``type`` is MMEngine's or ours of this name, written as text or imported."""
    package, _, last = _type_name(config).rpartition('.')
    return last == name and package.split('.')[0] in ('', 'mmengine', 'mm_sharp')
