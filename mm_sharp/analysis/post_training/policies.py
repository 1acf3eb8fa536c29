"""Policies by name, and a recipe's config in float and quantized by them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config

import mm_sharp
from mm_sharp.config import fragments
from mm_sharp.errors import UsageError, UserError, did_you_mean, in_folder
from mm_sharp.quantization import QuantizationPolicy, build

_FRAGMENTS = Path(mm_sharp.__file__).parent / '.mim' / 'configs' / '_base_' / 'quantization'


def read_policy(name: str) -> dict[str, Any]:
    """The ``policy`` of a fragment in ``configs/_base_/quantization``, by its name, or of a config file like one.

    Raises UsageError: There is no such fragment or file, or it sets no policy, or one that is not allowed.
    """
    known = sorted(path.stem for path in _FRAGMENTS.glob('*.py'))
    path = _FRAGMENTS / f'{name}.py' if name in known else Path(name)
    file = 'work_dirs/RECIPE/mixed.py'
    if path.suffix != '.py':
        raise UsageError(f'--policy {name}: no such policy; {did_you_mean(name, known)}, or a file: --policy {file}')
    if not path.is_file():
        raise UsageError(f'--policy {name}: no such file{in_folder(name)}; tools/sensitivity.py writes {file}')
    with fragments.as_written():
        settings: Any = Config.fromfile(path).get('sharp_quantization') or {}
    if not isinstance(settings.get('policy'), Mapping):
        raise UsageError(f"--policy {name}: '{path}' has no sharp_quantization = dict(policy=dict(…))")
    try:
        return _checked(settings.policy)
    except UserError as error:
        raise UsageError(f'--policy {name}: {error}') from error


def own_policy(cfg: Config) -> dict[str, Any] | None:
    """The policy of a config whose model is quantized, or None; a UserError if it is not allowed."""
    return _checked(cfg.model.policy) if cfg.model.get('type') == 'QuantizedModel' and 'policy' in cfg.model else None


def _checked(policy: Any) -> dict[str, Any]:
    plain: dict[str, Any] = policy.to_dict()
    QuantizationPolicy.from_config(plain)
    return plain


def float_config(cfg: Config) -> Config:
    """A copy of a config whose model is the float one."""
    cfg = deepcopy(cfg)
    cfg.model = build.float_config(cfg.model)
    cfg.pop('sharp_quantization', None)
    return cfg


def quantized_config(cfg: Config, policy: Mapping[str, Any]) -> Config:
    """A copy of a config whose model is quantized by a policy."""
    cfg = float_config(cfg)
    cfg.sharp_quantization = {'policy': deepcopy(dict(policy))}
    fragments.apply_fragments(cfg)
    return cfg
