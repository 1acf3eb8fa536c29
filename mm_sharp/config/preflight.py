"""Checks of a config before anything is built: wrapper, data set and checkpoint (ours).

MMEngine finds these mistakes as well, but after building the model, and says so in a traceback.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from mm_sharp.config.wrapper_checks import (
    check_arguments,
    check_constructor,
    check_optimizer,
    check_paramwise,
    wrapper_class,
    wrapper_configs,
)
from mm_sharp.errors import UsageError
from mm_sharp.methods.ausam import AUSAMOptimWrapper
from mm_sharp.methods.esam import ESAMOptimWrapper
from mm_sharp.methods.sam import SAMOptimWrapper
from mm_sharp.samples.ausam_sampler import AUSAMSampler
from mm_sharp.step.wrapper import TwoPassOptimWrapper

_FLOAT16 = ('float16', torch.float16)
_SLOWER = '15 to 23 times slower in'


def check_wrappers(cfg: Config) -> None:
    """Build every optimizer wrapper of ours or MMEngine's once, around a single number.

    Raises:
        UsageError: Unknown type or wrong argument, or a fragment that the config inherits and that
            :func:`mm_sharp.config.fragments.apply_fragments` could not put into effect.
    """
    classes = []
    members = wrapper_configs(cfg)
    check_constructor(cfg, cfg.optim_wrapper)
    for key, wrapper in members.items():
        cls = wrapper_class(cfg, key, wrapper)
        classes.append(cls)
        if not cls.__module__.startswith(('mm_sharp.', 'mmengine.')):
            continue  # others may want a real optimizer
        not_theirs = ('type', '_scope_', 'optimizer', 'constructor', 'paramwise_cfg')
        arguments = {name: deepcopy(value) for name, value in wrapper.items() if name not in not_theirs}
        check_arguments(key, cls, arguments)
        optimizer = check_optimizer(cfg, key, cls, wrapper)
        try:
            cls(optimizer=optimizer, **arguments)
        except (TypeError, ValueError, AssertionError, ImportError) as error:
            hint = '' if issubclass(cls, TwoPassOptimWrapper) else _theirs_hint(cls, arguments)
            raise UsageError(f'{key} (type {cls.__name__}): {error}{hint}') from error
        if issubclass(cls, TwoPassOptimWrapper) and arguments.get('dtype') in _FLOAT16 and get_device() == 'cpu':
            _say(f"{key}.dtype='float16': the CPU is {_SLOWER} it than in float32; take dtype='bfloat16'")
        if key == 'optim_wrapper':  # members of several have a constructor of their own
            check_paramwise(cfg, key, cls, wrapper)
    if cfg.get('sharp_optim_wrapper') and not any(issubclass(cls, TwoPassOptimWrapper) for cls in classes):
        raise UsageError(_unused_fragment(classes))


def check_sampler(cfg: Config) -> None:
    """Check that an ``AUSAMSampler`` in the training data loader has what it needs.

    Raises:
        UsageError: There is no AUSAMOptimWrapper to draw for, or ``drop_last`` stands where torch refuses it.
    """
    loader = cfg.get('train_dataloader') or {}
    batch_sampler = loader.get('batch_sampler') or {}
    if (loader.get('sampler') or {}).get('type') in ('AUSAMSampler', AUSAMSampler):
        raise UsageError(
            'train_dataloader.sampler: AUSAMSampler is a batch sampler, which works on top of a sampler: write '
            "train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), "
            "batch_sampler=dict(type='AUSAMSampler'))"
        )
    if batch_sampler.get('type') not in ('AUSAMSampler', AUSAMSampler):
        return
    classes = [wrapper_class(cfg, key, wrapper) for key, wrapper in wrapper_configs(cfg).items()]
    if sum(issubclass(cls, AUSAMOptimWrapper) for cls in classes) != 1:
        found = ', '.join(cls.__name__ for cls in classes)
        raise UsageError(
            'train_dataloader.batch_sampler: AUSAMSampler draws for one AUSAMOptimWrapper, and the config has '
            f"{found}: write optim_wrapper = dict(type='AUSAMOptimWrapper', …), or take batch_sampler out"
        )
    if loader.get('drop_last'):
        raise UsageError(
            'train_dataloader.drop_last=True does not go with a batch_sampler, which has its own: write '
            "train_dataloader = dict(drop_last=False, batch_sampler=dict(type='AUSAMSampler', drop_last=True))"
        )
    if not loader.get('in_order', True):
        raise UsageError(
            'train_dataloader.in_order=False is not allowed: AUSAMSampler must know which draw a batch is from. Write '
            "train_dataloader = dict(in_order=True, batch_sampler=dict(type='AUSAMSampler'))"
        )


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision: our wrappers get a dtype, MMEngine's plain one becomes its ``AmpOptimWrapper``.

    The dtype is float16, or bfloat16 on the CPU, which does float16 in software. One that the config sets stays.

    Raises:
        UsageError: A wrapper for which there is no way.
    """
    on_cpu = get_device() == 'cpu'
    for key, wrapper in wrapper_configs(cfg).items():
        cls = wrapper_class(cfg, key, wrapper)
        if issubclass(cls, TwoPassOptimWrapper):
            if wrapper.get('dtype') is None:
                wrapper['dtype'] = 'bfloat16' if on_cpu else 'float16'
                if on_cpu:
                    _say(f"--amp: {key}.dtype='bfloat16', since the CPU is {_SLOWER} float16 than in float32")
        elif cls in (OptimWrapper, AmpOptimWrapper):
            if on_cpu:
                raise UsageError(
                    "--amp: MMEngine's AmpOptimWrapper needs a GPU: leave out --amp, or take a wrapper that does it "
                    f"on the CPU, {key}=dict(type='SAMOptimWrapper', …)"
                )
            wrapper['type'] = 'AmpOptimWrapper'
            wrapper.setdefault('loss_scale', 'dynamic')
        else:
            raise UsageError(f'--amp cannot change {key}.type={cls.__name__}: set its precision in the config')


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the files of the data sets are there.

    Args:
        cfg: The whole config.
        *splits: Of ``'train'``, ``'val'`` and ``'test'``, those that will be read.

    Raises:
        UsageError: A file or folder is missing.
    """
    for split in splits:
        for where, path in _data_paths(cfg, split):
            if '://' in path or Path(path).exists():
                continue
            key = re.sub(r'(ann_file|data_prefix\..*)$', 'data_root', where) if '.dataset' in where else where
            hint = cfg.get('data_hint') or f'put the data set there, or say where it is: --cfg-options {key}=…'
            raise UsageError(f"no data: '{path}' ({where}) does not exist in {Path.cwd()}; {hint}")


def check_checkpoint(path: str, source: str, hint: str = '') -> None:
    """Check that a checkpoint is there and was written to its end.

    Args:
        path: The file; URLs are left to MMEngine.
        source: The option or key that names it.
        hint: How to come by it, where that is known.

    Raises:
        UsageError: It is missing or cut off.
    """
    if '://' in path:
        return
    if not Path(path).exists():
        raise UsageError(f"{source}: no checkpoint '{path}' in {Path.cwd()}{hint and '; ' + hint}")
    if not _is_complete(Path(path)):
        raise UsageError(f"{source}: '{path}' is cut off, or no checkpoint of torch's; take another")


def last_checkpoint(work_dir: str) -> str | None:
    """The newest checkpoint of a training run that can be resumed, or None.

    ``last_checkpoint`` in the work directory names it. Where that file is torn, or names one that is gone or cut off (a
    run can be killed at any time, and a folder moved), the newest complete one in the folder is taken.
    """
    folder = Path(work_dir)
    pointer = folder / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    found = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    candidates = sorted(found, key=_age, reverse=True)
    if named:
        candidates = [Path(named), folder / Path(named).name, *candidates]
    return next((str(file) for file in candidates if file.exists() and _is_complete(file)), None)


def _say(line: str) -> None:
    """Print a line, once a run."""
    if is_main_process():
        print_log(line)


def _age(file: Path) -> tuple[int, int]:
    """When a checkpoint was written, and its epoch or iteration: two may be written at one tick of the disk's clock."""
    number = file.stem.rpartition('_')[2]
    return file.stat().st_mtime_ns, int(number) if number.isdecimal() else -1


def _is_complete(file: Path) -> bool:
    """Whether a file is a checkpoint to its end: a zip archive, whose directory comes last, or torch's old pickle.

    Under FSDP with ``state_dict_cfg='local'`` it is a folder with a file of every process.
    """
    if file.is_dir():
        ranks = [file / f'rank{rank}.pth' for rank in range(int(os.environ.get('WORLD_SIZE', 1)))]
        return all(part.is_file() and _is_complete(part) for part in ranks)
    with file.open('rb') as stream:
        start = stream.read(2)
    return zipfile.is_zipfile(file) if start == b'PK' else start.startswith(b'\x80')


def _theirs_hint(cls: type[OptimWrapper], arguments: dict[str, Any]) -> str:
    """Advice for arguments of our wrappers that were given to another: a recipe's own ``type`` was left standing."""
    theirs = {name for base in cls.__mro__[:-1] for name in signature(base).parameters}
    left = [name for name in arguments if name not in theirs]
    for ours, kind in ((TwoPassOptimWrapper, SAMOptimWrapper), (ESAMOptimWrapper,) * 2, (AUSAMOptimWrapper,) * 2):
        meant = [name for name in left if name in signature(ours).parameters]
        if meant and {*meant} >= {*left} - {*signature(TwoPassOptimWrapper).parameters}:
            return f"; {', '.join(meant)}: meant for type='{kind.__name__}'?"
    return ''


def _unused_fragment(classes: list[type[OptimWrapper]]) -> str:
    """What to do about a fragment that did not take effect beside these optimizer wrappers."""
    names = ', '.join(cls.__name__ for cls in classes)
    message = f'the config inherits a fragment of mm_sharp, but trains without it, since its optim_wrapper is {names}: '
    if len(classes) > 1:
        return message + "give those that shall use it their type, as NAME=dict(type='SAMOptimWrapper', …)"
    return message + 'add the line `optim_wrapper = _base_.sharp_optim_wrapper`'


def _data_paths(cfg: Config, split: str) -> Iterator[tuple[str, str]]:
    """Dotted key and path of everything that a split reads."""
    dataloader = cfg.get(f'{split}_dataloader')
    if dataloader:
        yield from _dataset_paths(f'{split}_dataloader.dataset', dataloader.get('dataset'))
    evaluators = cfg.get(f'{split}_evaluator') or []
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    for metric in evaluators:
        if metric.get('ann_file'):
            yield f'{split}_evaluator.ann_file', metric['ann_file']


def _dataset_paths(where: str, dataset: Any) -> Iterator[tuple[str, str]]:
    """The same for a data set and those that it wraps (combined, repeated, concatenated)."""
    if not isinstance(dataset, dict):
        return
    root = dataset.get('data_root') or ''
    if dataset.get('ann_file'):
        yield f'{where}.ann_file', _join(root, dataset['ann_file'])
        for name, prefix in (dataset.get('data_prefix') or {}).items():
            if '://' not in root:
                yield f'{where}.data_prefix.{name}', _join(root, prefix)
    for name in ('bbox_file', 'headbox_file'):
        if dataset.get(name):
            yield f'{where}.{name}', dataset[name]
    yield from _dataset_paths(f'{where}.dataset', dataset.get('dataset'))
    for i, member in enumerate(dataset.get('datasets') or []):
        yield from _dataset_paths(f'{where}.datasets.{i}', member)


def _join(root: str, path: str) -> str:
    return path if '://' in path else os.path.join(root, path)
