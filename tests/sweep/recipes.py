"""The configs that the OpenMMLab packages ship, one for each distinct model, made shallow."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmengine.config import Config, config, utils
from mmengine.registry import MODELS, Registry

PACKAGES = ('mmpretrain', 'mmdet', 'mmpose')
# MMPretrain ships these losses, and no config with them.
EXTRA = {'mmpretrain': ('resnet/resnet18_8xb16_cifar10.py', ('SeesawLoss', 'FocalLoss', 'AsymmetricLoss'))}
# Keys that decide nothing about what a model is made of in training.
_ASIDE = ('init_cfg', 'test_cfg')


@dataclass(frozen=True)
class Recipe:
    """A config, and how many others have a model of the same parts.

    Args:
        package: ``'mmpretrain'``, ``'mmdet'`` or ``'mmpose'``.
        path: Below the package's ``configs/``.
        alike: Number of configs whose model has the same set of classes.
        loss: A loss that the head of no config has.
    """

    package: str
    path: str
    alike: int = 1
    loss: str = ''

    @property
    def name(self) -> str:
        """The path, and the loss if it is not the config's."""
        return f'{self.path} with {self.loss}' if self.loss else self.path

    def config(self) -> Config:
        """The config with nothing to download, for one process."""
        cfg = Config.fromfile(root(self.package) / self.path)
        if 'data_preprocessor' in cfg and 'data_preprocessor' not in cfg.model:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        if self.loss:
            cfg.model.head.loss = {'type': self.loss}
            if self.loss == 'SeesawLoss':
                cfg.model.head.loss.num_classes = cfg.model.head.num_classes
        for_one_process(cfg._cfg_dict)
        return cfg


def root(package: str) -> Path:
    """The folder of a package's configs."""
    origin = importlib.util.find_spec(package).origin  # type: ignore[union-attr]
    return Path(origin).parent / '.mim' / 'configs'  # type: ignore[arg-type]


def recipes(package: str, every: bool = False) -> tuple[list[Recipe], dict[str, str]]:
    """The configs to try, and those that cannot be read, with their errors.

    Args:
        package: Which one's.
        every: Of each set of classes the smallest config; otherwise only those with a class that none before has.
    """
    # Each config that is inherited from would be looked up among the installed packages anew.
    for module, name in ((config, 'is_installed'), (config, 'get_installed_path'), (utils, 'load')):
        setattr(module, name, functools.cache(getattr(module, name)))
    found: dict[frozenset[str], list[tuple[bool, float, float, str]]] = {}
    unread = {}
    for file in sorted(root(package).rglob('*.py')):
        path = str(file.relative_to(root(package)))
        if '_base_' in file.parts:
            continue
        try:
            cfg = Config.fromfile(file)
        except Exception as error:
            unread[path] = repr(error)
            continue
        if 'model' in cfg:
            found.setdefault(frozenset(_classes(cfg.model)), []).append(('deploy' in path, *_size(cfg.model), path))
    path, losses = EXTRA.get(package, ('', ()))
    chosen = [Recipe(package, path, 0, loss) for loss in losses]
    seen: set[str] = set()
    for classes, paths in found.items():
        if every or classes - seen:
            chosen.append(Recipe(package, min(paths)[-1], len(paths)))
            seen |= classes
    return chosen, unread


def _size(model: Mapping[str, Any]) -> tuple[float, float]:
    """Small for small models: by the numbers that MMDetection and MMPose give for width and depth."""
    backbone = model.get('backbone') or {}
    depth = backbone.get('depth', 0)
    return float(backbone.get('widen_factor', 1)), float(depth) if isinstance(depth, (int, float)) else 0.0


def _classes(part: Any) -> Iterator[str]:
    """The names of all classes that a model's config has, at any depth."""
    if isinstance(part, Mapping):
        if 'type' in part:
            yield getattr(part['type'], '__name__', part['type'])
        part = [value for key, value in part.items() if key not in _ASIDE]
    if isinstance(part, (list, tuple)):
        for value in part:
            yield from _classes(value)


def for_one_process(part: Any) -> None:
    """Take out of a config what is downloaded, at any depth, in place; and the norms that need several processes."""
    if isinstance(part, dict):
        if part.get('type') in ('SyncBN', 'MMSyncBN'):
            part['type'] = 'BN'
        start = part.get('init_cfg')
        if isinstance(start, Mapping) and 'checkpoint' in start:  # the type may be missing
            part['init_cfg'] = None
        for key in ('pretrained', 'teacher_ckpt', 'teacher_pretrained', 'load_from'):
            if isinstance(part.get(key), str):
                part[key] = None
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            for_one_process(value)


# ------------------------------------------------------------------------------------------------ fewer layers
_DEPTHS = ('depths', 'num_layers', 'num_blocks', 'blocks', 'layers', 'stage_blocks')
# Proposals, queries and samples of them; convolutions and channels in heads; the share of the layers that is kept.
_LIMITS = {
    'nms_pre': 50,
    'max_per_img': 50,
    'num': 8,
    'num_queries': 50,
    'num_proposals': 20,
    'num_convs': 1,
    'stacked_convs': 1,
    'fc_out_channels': 64,
    'feedforward_channels': 256,
    'deepen_factor': 0.1,
    'use_torchvision': False,  # whose operators need its compiled part
}


@contextmanager
def made_shallow(model: dict[str, Any]) -> Iterator[None]:
    """One layer a stage where a class or a config names their number; widths stay, so that all parts fit.

    ``model`` is changed in place; within the context, so are the tables of depths that classes have.
    """
    _shorten(model)
    with ExitStack() as stack:
        for kind in {kind for registry in _registries(MODELS) for kind in registry.module_dict.values()}:
            for name in ('arch_settings', 'arch_zoo'):
                if isinstance(table := vars(kind).get(name), dict):
                    shallow = {key: _shallow(value) for key, value in table.items()}
                    stack.enter_context(patch.object(kind, name, shallow))
        yield


def _registries(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _registries(child)


def _shallow(arch: Any) -> Any:
    """An architecture's entry: ``(block, (3, 4, 6, 3))`` as ResNets have it, or a dict."""
    if isinstance(arch, tuple) and len(arch) == 2 and isinstance(arch[1], (tuple, list)):
        return arch[0], type(arch[1])(1 for _ in arch[1]) if all(isinstance(n, int) for n in arch[1]) else arch[1]
    if isinstance(arch, dict):
        arch = copy.deepcopy(arch)
        _shorten(arch)
    return arch


def _shorten(part: Any) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            if key in _DEPTHS and isinstance(value, int) and not isinstance(value, bool):
                part[key] = min(value, 2)
            elif key in _DEPTHS and isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value):
                part[key] = type(value)(1 for _ in value)
            elif key in _LIMITS and isinstance(value, (int, float)):
                part[key] = min(value, _LIMITS[key])
            elif key != 'init_cfg':
                _shorten(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _shorten(value)
