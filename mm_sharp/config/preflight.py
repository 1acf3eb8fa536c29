"""Checks of a config: what only the whole config shows, the files that it names, and what MMEngine cannot build of it.

An optimizer wrapper's constructor checks its arguments: it is built once around a single number, so that the user need
not wait for the model. What MMEngine passes over in silence is refused for our wrappers alone. Its own errors name no
key of the config: :func:`friendly_build_errors` searches for it. :func:`install` has the same said by every other tool,
when a Runner by a config that uses this package registers its hooks, and when it begins to train.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, Registry, build_functions
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.optim import Optimizer

from mm_sharp.compat import is_ours, uses_mm_sharp
from mm_sharp.config.failure import explain_failure
from mm_sharp.config.fragments import imports_of
from mm_sharp.errors import RECOMMENDED, UsageError, arguments_of, check_arguments, closest, did_you_mean, is_number
from mm_sharp.step.wrapper import TwoPassOptimWrapper, registered_methods

_OPTIMIZER = "optimizer=dict(type='SGD', lr=0.01, momentum=0.9)"
_WRAPPER = f"optim_wrapper = dict(type='SAMOptimWrapper', {RECOMMENDED}, {_OPTIMIZER})"
_PARAMWISE = (
    "optimizer=dict(type='SGD', lr=0.01, weight_decay=1e-4), "
    'paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys=dict(backbone=dict(lr_mult=0.1)))'
)
# MMEngine's default constructor passes over all others without a word.
_PARAMWISE_KEYS = (
    *('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult'),
    *('dcn_offset_lr_mult', 'bypass_duplicate', 'custom_keys'),
)
_CUSTOM_KEYS = ('lr_mult', 'decay_mult')
_OF_NO_WRAPPER = ('type', '_scope_', 'optimizer', 'constructor', 'paramwise_cfg')  # but in its config
_CONSTRUCTOR = DefaultOptimWrapperConstructor.__name__
# What MMEngine adds to `default_hooks`; None in the place of any other hook fails there without a word.
_MMENGINES_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
_NONE = type(None)
_SLOWER = '15 to 23 times slower in'
# Key, what it must be (a kind, or an integer of at least a number), and an example.
_FORMS: tuple[tuple[str, str, Any, str], ...] = (
    ('model', 'a dict', Mapping, "model = dict(type='TopdownPoseEstimator', …)"),
    ('train_dataloader', 'a dict', Mapping, "train_dataloader = dict(sampler=dict(type='DefaultSampler'), …)"),
    ('train_cfg', 'a dict', Mapping, 'train_cfg = dict(by_epoch=True, max_epochs=10)'),
    ('train_dataloader.batch_size', 'an integer above 0', 1, 'train_dataloader = dict(batch_size=32)'),
    ('train_dataloader.num_workers', 'an integer from 0 on', 0, 'train_dataloader = dict(num_workers=4)'),
    ('train_dataloader.sampler', 'a dict', (Mapping, _NONE), "dict(sampler=dict(type='DefaultSampler'))"),
    ('train_dataloader.batch_sampler', 'a dict', (Mapping, _NONE), "dict(batch_sampler=dict(type='AUSAMSampler'))"),
    ('load_from', 'a path', (str, _NONE), "load_from = 'work_dirs/mine/epoch_1.pth'"),
    ('work_dir', 'a path', (str, _NONE), "work_dir = 'work_dirs/mine'"),
    ('default_scope', 'a name', (str, _NONE), "default_scope = 'mmpose'"),
    ('randomness.seed', 'an integer from 0 on', 0, 'randomness = dict(seed=0)'),
    ('auto_scale_lr.base_batch_size', 'an integer above 0', 1, 'auto_scale_lr = dict(base_batch_size=512)'),
    ('compile', 'True, False or a dict', (bool, Mapping, _NONE), "compile = dict(backend='inductor')"),
    ('default_hooks', 'a dict', (Mapping, _NONE), "default_hooks = dict(logger=dict(type='LoggerHook', interval=50))"),
    ('custom_hooks', 'a list', (list, tuple, _NONE), "custom_hooks = [dict(type='SharpnessHook')]"),
)


@contextmanager
def friendly_build_errors(cfg: Config) -> Iterator[None]:
    """Within, ``cfg`` is built and used; an error that :func:`explain` explains becomes a UsageError."""
    try:
        yield
    except (KeyError, TypeError) as error:
        message = explain(cfg, error)
        if message is None:
            raise
        raise UsageError(message) from error


def explain(cfg: Config, error: Exception) -> str | None:
    """The mistake in ``cfg`` for which MMEngine could not build a part, by its key; None for any other error."""
    # Code that fails while it trains raises the same kinds of errors, but no build function has called it.
    calls = [frame.f_locals for frame, _ in walk_tb(error.__traceback__) if frame.f_globals is vars(build_functions)]
    built = calls[-1]['cfg'] if calls else None
    if not isinstance(built, Mapping) or not built.get('type'):
        return None
    kind, registry = built['type'], calls[-1]['registry']
    parts = {key: part for key, part in _typed(cfg._cfg_dict, '') if type_name(part['type']) == type_name(kind)}
    cls = registry.get(kind) if isinstance(kind, str) else kind
    if cls is None and parts:
        names = {name for one in (registry.root, *registry.root.children.values()) for name in one.module_dict}
        return not_registered(f'{next(iter(parts))}.type', type_name(kind), names)
    given = {*built, *(calls[-1].get('default_args') or {})}
    return _explain_call(parts, cls, given, str(error)) if isinstance(cls, type) else None


def _explain_call(parts: Mapping[str, Mapping[str, Any]], cls: type, given: set[str], error: str) -> str | None:
    """The argument that one of ``parts`` has too much or too little for a class, which MMEngine called by ``given``."""
    # What a constructor calls in its turn, a base class's apart, is its own affair.
    if not any(f'{base.__init__.__qualname__}()' in error for base in cls.__mro__):  # type: ignore[misc]
        return None
    takes = arguments_of(cls)
    for key, part in parts.items():
        name = type_name(part['type'])
        for argument in part:
            if argument not in {*takes, 'type', '_scope_'} and f"'{argument}'" in error:
                hint = f'; {did_you_mean(argument, takes)}' if takes else ''
                written = f'{key} = dict(type={name!r}, …)'
                return f'{key}.{argument}: {name} has no such argument{hint}. Take it out of {written}'
        for argument, parameter in takes.items():
            if parameter.default is parameter.empty and argument not in {*given, *part} and f"'{argument}'" in error:
                written = f'{key} = dict(type={name!r}, {argument}=…)'
                return f'{key}: {name} needs {argument!r}. Write for example: {written}'
    return None


def not_registered(key: str, name: object, names: Collection[str]) -> str:
    """What to do about the ``type`` at a key; MMPose registers so many that a list of them would hide the rest."""
    close = closest(name, names)
    listed = f'there are {", ".join(sorted(names))}. Else ' if len(names) < 40 else ''
    hint = f'did you mean {close!r}? Else ' if close else listed
    imports = "custom_imports = dict(imports=['my_module'])"
    return f'{key}: {name!r} is not registered; {hint}import the module that registers it: {imports}'


def type_name(kind: Any) -> str:
    """A ``type`` as the name that it is registered by."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _typed(config: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted key and content of every dict with a ``type``."""
    if isinstance(config, Mapping) and config.get('type') is not None:
        yield key, config
    if isinstance(config, (list, tuple)):
        config = dict(enumerate(config))
    for name, value in config.items() if isinstance(config, Mapping) else ():
        yield from _typed(value, f'{key}.{name}' if key else str(name))


def check_wrappers(cfg: Config) -> None:
    """Build every optimizer wrapper of ours or MMEngine's once, around a single number; what fails is a UsageError."""
    members = wrapper_configs(cfg)
    classes = {key: wrapper_class(cfg, key, wrapper) for key, wrapper in members.items()}
    kind = cfg.optim_wrapper.get('constructor', _CONSTRUCTOR)
    constructor = _registered(cfg, OPTIM_WRAPPER_CONSTRUCTORS, 'optim_wrapper.constructor', kind)
    for key, wrapper in members.items():
        cls = classes[key]
        if not cls.__module__.startswith(('mm_sharp.', 'mmengine.')):
            if issubclass(cls, TwoPassOptimWrapper):
                _optimizer(cfg, key, wrapper)
            continue  # others may want a real optimizer
        arguments = {name: deepcopy(value) for name, value in wrapper.items() if name not in _OF_NO_WRAPPER}
        with _in_one_line(key):
            check_arguments(cls, arguments, registered_methods().values())
            cls(optimizer=_optimizer(cfg, key, wrapper), **arguments)
        if constructor is DefaultOptimWrapperConstructor and wrapper.get('paramwise_cfg'):
            _check_paramwise(key, cls, wrapper)
    if cfg.get('sharp_optim_wrapper') and not any(issubclass(cls, TwoPassOptimWrapper) for cls in classes.values()):
        raise UsageError(
            'the config inherits a fragment of mm_sharp, but trains without it, since its optim_wrapper is '
            f'{", ".join(cls.__name__ for cls in classes.values())}: add the line `optim_wrapper = '
            "_base_.sharp_optim_wrapper`, or give one of several its type, as NAME=dict(type='SAMOptimWrapper', …)"
        )


def wrapper_configs(cfg: Config) -> dict[str, Any]:
    """The config of each optimizer wrapper by its dotted key: one, or several for an ``OptimWrapperDict``."""
    top, members = cfg.get('optim_wrapper'), {}
    if isinstance(top, dict):
        parts = {'optim_wrapper': top, **{f'optim_wrapper.{key}': value for key, value in top.items()}}
        members = {k: v for k, v in parts.items() if isinstance(v, dict) and ('optimizer' in v or 'type' in v)}
    if not members:
        what = f'optim_wrapper={top!r} is not allowed: it must be a dict with a type and an optimizer'
        raise UsageError(f'{what}. Write for example: {_WRAPPER}')
    if 'optim_wrapper' in members:
        return {'optim_wrapper': top}
    if type_name(top.get('constructor', _CONSTRUCTOR)) == _CONSTRUCTOR:
        raise UsageError(
            f'optim_wrapper.constructor must be one of your own for {", ".join(members)}: the default one builds a '
            f"single wrapper. Write optim_wrapper = dict(constructor='MyConstructor', …), or one wrapper: {_WRAPPER}"
        )
    return members


def wrapper_class(cfg: Config, key: str, wrapper: Mapping[str, Any]) -> type[OptimWrapper]:
    """The class that MMEngine will build for an optimizer wrapper's config."""
    kind = wrapper.get('type', 'OptimWrapper')
    return _registered(cfg, OPTIM_WRAPPERS, f'{key}.type', kind, wrapper.get('_scope_'))  # type: ignore[no-any-return]


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision: our wrappers without a dtype get one, MMEngine's becomes its ``AmpOptimWrapper``."""
    on_cpu = get_device() == 'cpu'  # it does float16 in software
    for key, wrapper in wrapper_configs(cfg).items():
        cls = wrapper_class(cfg, key, wrapper)
        if issubclass(cls, TwoPassOptimWrapper):
            if wrapper.get('dtype') is None:
                wrapper['dtype'] = 'bfloat16' if on_cpu else 'float16'
                if on_cpu:
                    _say(f"--amp: {key}.dtype='bfloat16', since the CPU is {_SLOWER} float16 than in float32")
        elif cls not in (OptimWrapper, AmpOptimWrapper):
            raise UsageError(f'--amp cannot change {key}.type={cls.__name__}: set its precision in the config')
        elif on_cpu:
            instead = f"take a wrapper that does it on the CPU, {key}=dict(type='SAMOptimWrapper', …)"
            raise UsageError(f"--amp: MMEngine's AmpOptimWrapper needs a GPU: leave out --amp, or {instead}")
        else:
            wrapper['type'] = 'AmpOptimWrapper'
            wrapper.setdefault('loss_scale', 'dynamic')


def _optimizer(cfg: Config, key: str, wrapper: Mapping[str, Any]) -> Optimizer:
    """The config's optimizer around a single number; an SGD for another package's that takes no such thing."""
    config, written = wrapper.get('optimizer'), f'{key} = dict({_OPTIMIZER}, …)'
    # A matrix, since some optimizers (Muon) take nothing else; on the training's device, since AMP depends on it.
    device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if get_device() == 'cuda' else 'cpu'
    weights = [nn.Parameter(torch.zeros(1, 1, device=device))]
    if not isinstance(config, Mapping) or not config.get('type'):
        raise UsageError(f'{key}.optimizer={config!r} is no dict with a type. Write for example: {written}')
    if (inner := type_name(config['type'])) in OPTIM_WRAPPERS.module_dict:
        outer = inner if inner in registered_methods() else type_name(wrapper.get('type'))
        raise UsageError(
            f'{key}.optimizer.type={inner!r} is not allowed: it must be an optimizer, and this is a wrapper, '
            f'which goes around one. Write for example: {key} = dict(type={outer!r}, {_OPTIMIZER}, …)'
        )
    kind = _registered(cfg, OPTIMIZERS, f'{key}.optimizer.type', config['type'], config.get('_scope_'))
    arguments = {name: deepcopy(value) for name, value in config.items() if name not in ('type', '_scope_')}
    takes = ', '.join(list(signature(kind).parameters)[1:])
    with _in_one_line(f'{key}.optimizer={dict(config)!r}', f'{written}. {kind.__name__} takes {takes}'):
        signature(kind).bind(weights, **arguments)
        try:
            return kind(weights, **arguments)  # type: ignore[no-any-return]
        except Exception:  # another package's may ask for a whole model
            if kind.__module__.startswith('torch.'):
                raise
    return torch.optim.SGD(weights, lr=1.0, momentum=0.9)  # with all that a wrapper may ask for


def _check_paramwise(key: str, cls: type[OptimWrapper], wrapper: Mapping[str, Any]) -> None:
    """Have MMEngine's constructor check its ``paramwise_cfg``; for our wrappers, refuse what it would pass over."""
    paramwise = wrapper['paramwise_cfg']
    with _in_one_line(f'{key}.paramwise_cfg={paramwise!r}', _PARAMWISE):
        DefaultOptimWrapperConstructor({'optimizer': dict(wrapper['optimizer'])}, deepcopy(paramwise))
        for place in paramwise.get('custom_keys') or {}:
            if not isinstance(place, str):
                raise ValueError(f'custom_keys.{place} is no part of the name of a parameter, which is a text')
        if not issubclass(cls, TwoPassOptimWrapper):
            return
        for name in paramwise:
            if name not in _PARAMWISE_KEYS:
                raise ValueError(f'there is no key {name!r}; {did_you_mean(name, _PARAMWISE_KEYS)}')
        for place, rules in {'': paramwise, **(paramwise.get('custom_keys') or {})}.items():
            if not isinstance(rules, Mapping):
                raise ValueError(f'custom_keys.{place}={rules!r} must be a dict')
            for name, value in ((str(name), value) for name, value in rules.items()):
                if name.endswith('_mult') and not is_number(value):
                    raise ValueError(f'{place}{place and "."}{name}={value!r} must be a number')
                # Others become entries of the optimizer's group, and which it reads, only the optimizer knows.
                if place and name not in _CUSTOM_KEYS and (close := closest(name, _CUSTOM_KEYS)):
                    raise ValueError(f'custom_keys.{place}.{name}: did you mean {close!r}?')


def check_training(cfg: Config) -> None:
    """Check all that a training run needs, its data and checkpoints apart; what is wrong is a UsageError."""
    for key, allowed, kind, example in _FORMS:
        value: Any = cfg
        for part in key.split('.'):
            value = value.get(part) if isinstance(value, (Config, Mapping)) else None
        is_int = value is None or (type(value) is int and isinstance(kind, int) and value >= kind)
        if not (is_int if isinstance(kind, int) else isinstance(value, kind)):
            what = f'{key} is missing' if value is None else f'{key}={value!r} is not allowed'
            raise UsageError(f'{what}: it must be {allowed}. Write for example: {example}')
    check_wrappers(cfg)
    for key, wrapper in wrapper_configs(cfg).items():
        is_half = wrapper.get('dtype') in ('float16', torch.float16) and get_device() == 'cpu'
        if is_half and issubclass(wrapper_class(cfg, key, wrapper), TwoPassOptimWrapper):
            _say(f"{key}.dtype='float16': the CPU is {_SLOWER} it than in float32; take dtype='bfloat16'")
    check_sampler(cfg.train_dataloader)
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if hook is None and name not in _MMENGINES_HOOKS:
            raise UsageError(
                f'default_hooks.{name}=None is not allowed: so MMEngine switches off {", ".join(_MMENGINES_HOOKS)} '
                f'only. Write the hooks anew, without {name}: default_hooks = dict(_delete_=True, …)'
            )
        _check_hook(cfg, f'default_hooks.{name}', hook)
    for number, hook in enumerate(cfg.get('custom_hooks') or []):
        _check_hook(cfg, f'custom_hooks.{number}', hook)


def check_sampler(loader: Mapping[str, Any]) -> None:
    """Refuse an ``AUSAMSampler`` in the place of a sampler, or beside what torch refuses."""
    sampler, batch_sampler = (type_name((loader.get(key) or {}).get('type')) for key in ('sampler', 'batch_sampler'))
    if sampler == 'AUSAMSampler':
        what = 'sampler: AUSAMSampler is a batch sampler, which works on top of a sampler'
    elif batch_sampler == 'AUSAMSampler' and loader.get('drop_last'):
        what = 'drop_last=True does not go with a batch_sampler, which has its own'
    else:
        return
    raise UsageError(
        f"train_dataloader.{what}. Write train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), "
        "drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True))"
    )


def _check_hook(cfg: Config, key: str, hook: Any) -> None:
    """Build a hook of MMEngine's or ours once, and check the one value that MMEngine looks at only while it trains."""
    if hook is None or isinstance(hook, Hook):
        return
    if not isinstance(hook, Mapping) or not hook.get('type'):
        raise UsageError(f"{key}={hook!r} is no dict with a type. Write for example: dict(type='SharpnessHook')")
    cls = _registered(cfg, HOOKS, key, hook['type'], hook.get('_scope_'), required=False)
    # What is not registered yet, MMEngine may import before it builds it; what others' intervals may be, they know.
    if cls is None or not cls.__module__.startswith(('mmengine.', 'mm_sharp.')):
        return
    takes = arguments_of(cls)
    needed = [f'{name}=…' for name, parameter in takes.items() if parameter.default is parameter.empty]
    shown = 'interval=50' if 'interval' in takes else ', '.join([*needed, '…'])
    example = f'dict(type={type_name(hook["type"])!r}, {shown})'
    default = takes['interval'].default if 'interval' in takes else 1
    if type(hook.get('interval', default)) not in (int, type(default)):
        raise UsageError(f'{key}.interval={hook["interval"]!r} must be an integer. Write for example: {example}')
    arguments = {n: deepcopy(v) for n, v in hook.items() if n not in ('type', '_scope_', 'priority')}
    with _in_one_line(key, f'{example}. {cls.__name__} takes {", ".join(takes)}'):
        cls(**arguments)


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the files of the data sets are there; ``splits`` are of ``'train'``, ``'val'`` and ``'test'``."""
    missing: dict[str, str] = {}
    keys: dict[str, None] = {}
    for split in splits:
        evaluators = cfg.get(f'{split}_evaluator') or []
        # What has another form, MMEngine refuses.
        metrics = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
        files = [metric.get('ann_file') for metric in metrics if isinstance(metric, dict)]
        of_evaluators = [(f'{split}_evaluator', 'ann_file', file) for file in files if isinstance(file, str)]
        loader = cfg.get(f'{split}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, dict) else None
        for where, name, path in (*_data_paths(f'{split}_dataloader.dataset', dataset), *of_evaluators):
            if not path or '://' in path or Path(path).exists():
                continue
            missing.setdefault(path, f'{where}.{name}')
            in_root = name.startswith(('ann', 'data')) and 'dataset' in where
            keys[f'{where}.data_root' if in_root else f'{where}.{name}'] = None
    if missing:
        listed = ', '.join(f"'{path}' ({where})" for path, where in missing.items())
        options = ' '.join(f'{key}=…' for key in keys)
        hint = cfg.get('data_hint') or f'put the data set there, link it, or say where it is: --cfg-options {options}'
        where = '' if all(map(os.path.isabs, missing)) else f': not in {Path.cwd()}'
        raise UsageError(f'no data: {listed}{where}; {hint}')


def _data_paths(where: str, dataset: Any) -> Iterator[tuple[str, str, str]]:
    """Dotted key of a data set, argument and path of everything that it reads, or that one which it wraps reads."""
    if not isinstance(dataset, dict):
        return
    if dataset.get('ann_file'):
        prefix = dataset.get('data_prefix')  # MMPretrain's data sets take a single one, too
        prefixes = {f'.{name}': value for name, value in prefix.items()} if isinstance(prefix, dict) else {'': prefix}
        paths = {'ann_file': dataset['ann_file'], **{f'data_prefix{name}': path for name, path in prefixes.items()}}
        for name, path in ((name, path) for name, path in paths.items() if isinstance(path, str)):
            yield where, name, path if '://' in path else os.path.join(str(dataset.get('data_root') or ''), path)
    for name in ('bbox_file', 'headbox_file'):
        if isinstance(dataset.get(name), str):
            yield where, name, dataset[name]
    yield from _data_paths(f'{where}.dataset', dataset.get('dataset'))
    for i, member in enumerate(dataset.get('datasets') or []):
        yield from _data_paths(f'{where}.datasets.{i}', member)


def _registered(
    cfg: Config, registry: Registry, key: str, kind: Any, scope: str | None = None, required: bool = True
) -> Any:
    """The class that MMEngine finds for a ``type``; where there is none, a UsageError, or None if not ``required``."""
    with registry.switch_scope_and_registry(scope or cfg.get('default_scope', 'mmengine')) as found:
        cls = kind if callable(kind) else found.get(kind) if isinstance(kind, str) and kind else None
        if cls is None and required:
            raise UsageError(not_registered(key, kind, {*found.module_dict, *registry.module_dict}))
        return cls


@contextmanager
def _in_one_line(key: str, example: str = '') -> Iterator[None]:
    """An error of MMEngine's or of a constructor, with the config's key and a right form."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AssertionError, ImportError) as error:
        written = f'. Write for example: {example}' if example else ''
        raise UsageError(f'{key}: {str(error).removesuffix(".")}{written}') from error


def _say(line: str) -> None:
    if is_main_process():
        print_log(line)


def install() -> None:
    """From now on configs of runs that use this package are checked; a second call changes nothing."""
    for kind in (Runner, FlexibleRunner):
        if not hasattr(kind.train, '_is_checked'):
            kind.train = _guarded(kind.train, uses_mm_sharp, _check)
            kind.register_hooks = _guarded(kind.register_hooks, lambda runner: is_ours(runner.optim_wrapper))


def _guarded(
    method: Callable[..., Any], concerns: Callable[[Any], bool], check: Callable[[Any], None] = lambda _: None
) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A misspelt wrapper is nobody's: what tells is that the config imports this package.
        if not (concerns(self) or any(str(name).startswith('mm_sharp') for name in imports_of(self.cfg))):
            return method(self, *args, **kwargs)
        with friendly_build_errors(self.cfg):
            check(self)
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                explain_failure(self, error)
                raise

    wrapper._is_checked = True  # type: ignore[attr-defined]
    return wrapper


def _check(runner: Any) -> None:
    """Check what is not built yet; a UsageError says what to write."""
    optim_wrapper, loader = runner.optim_wrapper, runner._train_dataloader
    built = (Optimizer, OptimWrapper)
    if isinstance(optim_wrapper, dict) and not any(isinstance(part, built) for part in optim_wrapper.values()):
        scope = runner.cfg.get('default_scope', 'mmengine')
        check_wrappers(Config({'optim_wrapper': optim_wrapper, 'default_scope': scope}))
    if isinstance(loader, dict):
        check_sampler(loader)
