"""Checks of what a training needs besides its optimizer wrapper: data loader, loop and hooks (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS

from mm_sharp.config.wrapper_checks import registered
from mm_sharp.errors import UsageError

_PARTS = {
    'model': "model = dict(type='TopdownPoseEstimator', …)",
    'train_dataloader': "train_dataloader = dict(batch_size=32, sampler=dict(type='DefaultSampler', shuffle=True), …)",
    'train_cfg': 'train_cfg = dict(by_epoch=True, max_epochs=10)',
}


def check_training(cfg: Config) -> None:
    """Check the parts of a training run that are numbers and switches.

    Raises:
        UsageError: A part is missing, or a value is not of its kind.
    """
    for key, example in _PARTS.items():
        if not isinstance(cfg.get(key), Mapping):
            what = 'missing' if cfg.get(key) is None else f'{cfg[key]!r}, which is no dict'
            raise UsageError(f'{key} is {what}. Write for example: {example}')
    loader = cfg.train_dataloader
    _check_int('train_dataloader.batch_size', loader.get('batch_size', 1), 1, 'train_dataloader = dict(batch_size=32)')
    _check_int(
        'train_dataloader.num_workers', loader.get('num_workers', 0), 0, 'train_dataloader = dict(num_workers=4)'
    )
    for name in ('sampler', 'batch_sampler'):
        value = loader.get(name)
        if isinstance(value, str) or (isinstance(value, Mapping) and not value.get('type')):
            example = (
                f'train_dataloader = dict({name}=dict(type={"AUSAMSampler" if "_" in name else "DefaultSampler"!r}))'
            )
            raise UsageError(f'train_dataloader.{name}={value!r} is no dict with a type. Write for example: {example}')
    for name in ('load_from', 'work_dir'):
        if not isinstance(cfg.get(name), (str, type(None))):
            raise UsageError(f"{name}={cfg[name]!r} is no path. Write for example: {name} = 'work_dirs/mine'")
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None:
        _check_int('randomness.seed', seed, 0, 'randomness = dict(seed=0)')
    _check_compile(cfg.get('compile'))
    scaling = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' in scaling:
        example = 'auto_scale_lr = dict(base_batch_size=512)'
        _check_int('auto_scale_lr.base_batch_size', scaling['base_batch_size'], 1, example)


def check_hooks(cfg: Config) -> None:
    """Build MMEngine's hooks and ours once; of other packages', check that they are dicts with a type.

    Raises:
        UsageError: A hook's form, type, interval or another argument is wrong.
    """
    for key, hook in _hooks(cfg):
        if hook is None or isinstance(hook, Hook):
            continue
        if not isinstance(hook, Mapping) or not hook.get('type'):
            example = (
                "dict(type='SharpnessHook')" if key.startswith('custom') else "dict(type='LoggerHook', interval=50)"
            )
            raise UsageError(f'{key}={hook!r} is no dict with a type. Write for example: {example}')
        cls = registered(cfg, HOOKS, hook['type'], hook.get('_scope_'))
        # What is not registered is said when MMEngine builds it, which may import it before.
        if cls is not None and cls.__module__.startswith(('mmengine.', 'mm_sharp.')):
            _check_hook(key, cls, hook)


def _check_compile(value: Any) -> None:
    if not isinstance(value, (bool, Mapping, type(None))):
        raise UsageError(
            f"compile={value!r} is not allowed: True, False or a dict of torch.compile's arguments. Write for example: "
            "compile = dict(backend='inductor')"
        )
    backend = (value or {}).get('backend') if isinstance(value, Mapping) else None
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise UsageError(
                f'compile.backend: no backend {backend!r}; there are {", ".join(known)}. Write for example: '
                "compile = dict(backend='inductor')"
            )


def _check_hook(key: str, cls: type[Hook], hook: Mapping[str, Any]) -> None:
    name, arguments = (
        cls.__name__,
        {n: deepcopy(v) for n, v in hook.items() if n not in ('type', '_scope_', 'priority')},
    )
    if isinstance(arguments.get('interval'), (str, float, bool)):
        raise UsageError(
            f'{key}.interval={hook["interval"]!r} is not allowed: it must be an integer. Write for example: '
            f'dict(type={name!r}, interval=50)'
        )
    try:
        cls(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        takes = ', '.join(str(p).partition(':')[0] for p in signature(cls).parameters.values())
        example = f'. Write for example: dict(type={name!r}, interval=50)' if issubclass(cls, LoggerHook) else ''
        raise UsageError(f'{key} (type {name}): {error}. It takes {takes}{example}') from error


def _hooks(cfg: Config) -> Iterator[tuple[str, Any]]:
    defaults, custom = cfg.get('default_hooks') or {}, cfg.get('custom_hooks') or []
    if not isinstance(defaults, Mapping) or not isinstance(custom, (list, tuple)):
        raise UsageError(
            'default_hooks must be a dict and custom_hooks a list. Write for example: '
            "default_hooks = dict(logger=dict(type='LoggerHook', interval=50)), "
            "custom_hooks = [dict(type='SharpnessHook')]"
        )
    yield from ((f'default_hooks.{name}', hook) for name, hook in defaults.items())
    yield from ((f'custom_hooks.{i}', hook) for i, hook in enumerate(custom))


def _check_int(key: str, value: Any, low: int, example: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f'{key}={value!r} is not allowed: an integer of at least {low}. Write for example: {example}')
