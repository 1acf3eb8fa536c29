"""Configs by the name of a package.

Of others: MMEngine's ``is_installed`` and ``get_installed_path`` need ``pkg_resources``, which setuptools has no longer
from version 81 on; both are made to ask the standard library. (A fake ``pkg_resources`` would deceive those who test
for it.) Of ours: ``mm_sharp`` joins MMEngine's fixed table of packages, without its name as the registry scope of what
is read, which would hide the inheriting config's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
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
    """The folder of an installed package, by the name of its distribution or module, or a ModuleNotFoundError."""
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


@partial(Fix, 'pkg_resources', 'an mmengine without pkg_resources (none as of 0.10.7), or setuptools below 81')
def fix_lookup(module: str) -> str | None:
    if is_present('pkg_resources'):
        return None
    for new in (is_installed, get_installed_path):
        _replace(getattr(package_utils, new.__name__), new)
    return 'setuptools is missing or too new to have it; the standard library is asked instead'


@partial(Fix, 'mm_sharp:: configs', 'an mmengine whose table of packages is open (none as of 0.10.7)')
def fix_scope(module: str) -> str | None:
    if MODULE2PACKAGE.setdefault(_SCOPE, _LOCATOR) != _LOCATOR:
        return None  # this mmengine knows us by itself
    get_cfg_path = Config._get_cfg_path

    @wraps(get_cfg_path)
    def without_our_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == _SCOPE else scope

    Config._get_cfg_path = staticmethod(without_our_scope)
    return f'resolved to {Path(__file__).parents[1] / ".mim" / "configs"}'
