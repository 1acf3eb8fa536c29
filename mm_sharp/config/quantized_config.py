"""A config whose model is to be quantized: its key ``sharp_quantization``, and what becomes of it (ours).

The key was ``quantization`` once, a name that other projects use too. It is still read where it can only be ours:
beside ``sharp_quantization`` (a config that inherits a fragment and changes it by the old name), or where all that is
in it has exactly our form. Everywhere else ``quantization`` is left alone.

No Brevitas here: configs must be readable without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config, ConfigDict

from mm_sharp.config.config_types import is_type, type_name, unbuilt, written

KEY, OLD_KEY = 'sharp_quantization', 'quantization'
# What mm_sharp.quantization knows, by which a config's dict is told from another project's.
POLICY_KEYS = frozenset(
    {
        *('weight_bit_width', 'act_bit_width', 'weight_granularity', 'weight_scales', 'act_scales'),
        *('weight_symmetric', 'act_symmetric', 'scale_init', 'first_layers', 'last_layers', 'layers', 'skip'),
        *('fold_batchnorm', 'input_size'),
    }
)
CALIBRATION_KEYS = frozenset({'num_batches', 'bias_correction', 'baseline'})
_PACKAGE = 'mm_sharp.quantization'
_PARTS = ('policy', 'calibration')
# Of a key with a slip of the finger, as difflib measures it.
_CLOSE = 0.8


def settings_of(cfg: Config) -> Any:
    """How the config's model is to be quantized, by either key; None where it is not."""
    if KEY not in cfg._cfg_dict:
        old = written(cfg, OLD_KEY)
        return old if _has_our_form(old) else None
    ours, old = written(cfg, KEY), written(cfg, OLD_KEY)
    if not isinstance(ours, dict) or not takes_old_key(cfg):
        return ours
    if old is None:
        return None
    # MMEngine can merge no dict into None, which is how a part is switched off.
    base = {part: value for part, value in unbuilt(ours).items() if value is not None}
    return Config._merge_a_into_b({KEY: deepcopy(old)}, {KEY: ConfigDict(base)})[KEY]


def takes_old_key(cfg: Config) -> bool:
    """Whether a config has the old key, and it is ours."""
    if OLD_KEY not in cfg._cfg_dict:
        return False
    old = written(cfg, OLD_KEY)
    if KEY not in cfg._cfg_dict:
        return _has_our_form(old)
    if isinstance(old, dict):
        return any(part in old and isinstance(old[part], (dict, type(None))) for part in _PARTS)
    return old is None


def merge_old_key(cfg: Config) -> bool:
    """Merge the old key into the new one beside it, in place, so that a copy of the config has one key with the numbers
    that are used; returns whether there was anything to merge.
    """
    if KEY not in cfg._cfg_dict or not takes_old_key(cfg):
        return False
    merged = settings_of(cfg)
    del cfg._cfg_dict[OLD_KEY]
    cfg[KEY] = merged
    return True


def left_alone(cfg: Config, uses_us: bool) -> str:
    """What to say of a ``quantization`` that is left alone and may be meant for us; empty if there is nothing to say.

    Args:
        cfg: The config.
        uses_us: Whether it uses anything else of this package. If not, the value must be nearly of our form.
    """
    old = written(cfg, OLD_KEY)
    if not isinstance(old, dict) or not old or takes_old_key(cfg):
        return ''
    policies = [
        value
        for part, value in unbuilt(old).items()
        if isinstance(value, dict) and value and get_close_matches(str(part), ['policy'], cutoff=_CLOSE)
    ]
    nearly_ours = any(
        all(get_close_matches(str(key), POLICY_KEYS, cutoff=_CLOSE) for key in unbuilt(policy)) for policy in policies
    )
    if not uses_us and not nearly_ours:
        return ''
    return (
        f'{OLD_KEY} = {old!r} is left alone, since it has not the form of mm_sharp: if it is meant to quantize the '
        f'model, write {KEY} = dict(policy=dict(weight_bit_width=4, act_bit_width=4))'
    )


def check_settings(cfg: Config, settings: Any) -> None:
    """Refuse settings of a form that they cannot have; what is in the two dicts, their owners check.

    Raises:
        ValueError: No dict of a ``policy`` and, at most, a ``calibration``.
    """
    name = f'{KEY} (with {OLD_KEY}, its old name)' if takes_old_key(cfg) else KEY
    example = f'{KEY} = dict(policy=dict(weight_bit_width=4, act_bit_width=4), calibration=dict(num_batches=16))'
    if not isinstance(settings, dict):
        raise ValueError(f'{name}={settings!r} must be a dict. Write {example}')
    unknown = sorted(map(str, set(settings) - {*_PARTS}))
    if unknown:
        raise ValueError(f'{name}: unknown keys {unknown}; there are policy and calibration. Write {example}')
    if not isinstance(settings.get('policy'), dict):
        raise ValueError(f'{name}.policy={settings.get("policy")!r} must be a dict. Write {example}')
    if not isinstance(settings.get('calibration'), (dict, type(None))):
        raise ValueError(f'{name}.calibration={settings["calibration"]!r} must be a dict. Write {example}')


def quantized(model: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    """The config of a quantized model.

    Only the float model's class becomes ``model``. Its arguments stay where they were, the scope that it is built in
    among them, and ``QuantizedModel`` hands them on: programs read and set ``cfg.model.backbone``, ``cfg.model.head``
    or ``cfg.model.train_cfg`` (MMPose's ``init_model`` does), and any tool's ``--cfg-options model.head.…`` still work.
    """
    arguments = unbuilt(model)
    inner: Any = model
    if not {'model', 'policy'}.isdisjoint(arguments):
        arguments = {}  # it has arguments of its own by these names
    elif 'type' in arguments:
        kind = arguments.pop('type')
        inner = kind if isinstance(kind, str) else ConfigDict(type=kind)
    return {**arguments, 'type': 'QuantizedModel', 'model': inner, 'policy': deepcopy(policy)}


def has_quantized_model(cfg: Config) -> bool:
    """Whether a config's model is our ``QuantizedModel``, and not another project's of the same name."""
    model = written(cfg, 'model')
    if not isinstance(model, dict) or not is_type(model, 'QuantizedModel'):
        return False
    if '.' in type_name(model, 'type') or KEY in cfg._cfg_dict or takes_old_key(cfg):
        return True
    names_us = imports_us(cfg)
    policy = unbuilt(model).get('policy')
    return names_us or (isinstance(policy, dict) and 'model' in model and set(policy) <= POLICY_KEYS)


def import_quantization(cfg: Config) -> None:
    """Import what registers ``QuantizedModel``, now and wherever a copy of the config is read."""
    imports = _imports(cfg)
    if _PACKAGE not in imports:
        entry = unbuilt(written(cfg, 'custom_imports') or {'allow_failed_imports': False})
        cfg.custom_imports = {**entry, 'imports': [*imports, _PACKAGE]}
    # By name: mm_sharp must work without the packages that quantization needs. Where they are missing, its error says
    # how to install them.
    importlib.import_module(_PACKAGE)


def imports_us(cfg: Config) -> bool:
    """Whether a config's ``custom_imports`` name this package."""
    return any(str(name).split('.')[0] == 'mm_sharp' for name in _imports(cfg))


def _imports(cfg: Config) -> list[Any]:
    """The modules that a config has imported by ``custom_imports``."""
    imports = (written(cfg, 'custom_imports') or {}).get('imports') or []
    return [imports] if isinstance(imports, str) else list(imports)


def _has_our_form(value: Any) -> bool:
    """Whether a value of the old key consists of our two dicts with our keys alone, and says something."""
    if not isinstance(value, dict) or not _consists_of(value, _PARTS) or not isinstance(value.get('policy'), dict):
        return False
    parts = [part for part in (value['policy'], value.get('calibration')) if part]
    keys = (POLICY_KEYS, CALIBRATION_KEYS) if value['policy'] else (CALIBRATION_KEYS,)
    return bool(parts) and all(map(_consists_of, parts, keys))


def _consists_of(value: Any, keys: Iterable[str]) -> bool:
    """Whether a value is a dict with some of these keys, and no other."""
    return isinstance(value, dict) and bool(value) and set(value) <= set(keys)
