"""Configs by the name of a package.

**Of others**: ``_base_ = ['mmpose::…']`` and ``mmengine.hub.get_config`` need ``is_installed`` and
``get_installed_path`` of ``mmengine.utils``, which import ``pkg_resources``; setuptools no longer has it from version
81 on. Fix: where it is missing, both are replaced by functions that ask the standard library. ``pkg_resources`` itself
is not faked: other packages test for it, and would call what a stand-in does not have.

**Of ours**: MMEngine resolves such names for the packages of a fixed table. It looks for ``<package>/.mim/configs``,
and marks what it reads with the package's name as the registry scope. Fix: enter ``mm_sharp`` in the table, and leave
the mark away for our configs. All our names are in MMEngine's root registries, so a mark would only hide the scope of
the inheriting config, usually ``mmpose``. MMEngine reads ``_base_`` before it obeys ``custom_imports``: with MMPose's
own tools, name the base by its path instead.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mmengine.utils.package_utils as package_utils
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from .fix import Fix, is_present

_SCOPE = 'mm_sharp'
# MMEngine turns this name into a folder, that of the distribution or else of the module. The distribution 'mm_sharp'
# has no files beside its metadata in an editable install; this module is always in our folder.
_LOCATOR = 'mm_sharp.errors'


def is_installed(package: str) -> bool:
    """Whether a distribution or a module of this name is installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution(package)
        return True
    return _module_folder(package) is not None


def get_installed_path(package: str) -> str:
    """The folder of an installed package, by the name of its distribution or of its module.

    Raises:
        ModuleNotFoundError: there is neither, or it is a namespace package, which has no folder of its own.
    """
    names = [package]
    with suppress(importlib.metadata.PackageNotFoundError):  # a distribution named otherwise than its module
        names += (importlib.metadata.distribution(package).read_text('top_level.txt') or '').split()
    for folder in filter(None, map(_module_folder, names)):
        return folder
    raise ModuleNotFoundError(f'no folder of the package {package!r} was found: pip install {package}')


def _module_folder(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a name with dots whose parent is missing
        return None
    return str(Path(spec.origin).parent) if spec is not None and spec.origin is not None else None


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Rebind ``old`` in every module of the OpenMMLab family that imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith('mm') and getattr(module, old.__name__, None) is old:
            setattr(module, old.__name__, new)


def _patch_lookup(module: str) -> str | None:
    if is_present('pkg_resources'):
        return None
    for new in (is_installed, get_installed_path):
        _replace(getattr(package_utils, new.__name__), new)
    return 'setuptools is missing or too new to have it; the standard library is asked instead'


def _patch_scope(module: str) -> str | None:
    if MODULE2PACKAGE.setdefault(_SCOPE, _LOCATOR) != _LOCATOR:
        return None  # this mmengine knows us by itself
    get_cfg_path = Config._get_cfg_path

    @functools.wraps(get_cfg_path)
    def without_our_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == _SCOPE else scope

    Config._get_cfg_path = staticmethod(without_our_scope)
    return f'resolved to {Path(__file__).parents[1] / ".mim" / "configs"}'


LOOKUP = Fix(
    name='pkg_resources',
    patch=_patch_lookup,
    ends_with='an mmengine without pkg_resources (none as of 0.10.7), or setuptools below 81',
)
SCOPE = Fix(
    name='mm_sharp:: configs',
    patch=_patch_scope,
    ends_with='an mmengine whose table of packages is open (none as of 0.10.7)',
)
