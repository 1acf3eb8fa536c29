"""``pkg_resources``, which MMEngine needs to inherit configs.

Cause: ``mmengine.utils.is_installed`` and ``get_installed_path`` import ``pkg_resources``, which setuptools no longer
has from version 81 on. ``_base_ = ['mmpose::…']`` and ``mmengine.hub.get_config`` call them.

Fix: where ``pkg_resources`` is missing, both are replaced by functions that ask the standard library. ``pkg_resources``
itself is not faked: other packages test for it, and would call what a stand-in does not have.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mmengine.utils.package_utils as package_utils

from .fix import Fix, is_present


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


def _patch(module: str) -> str | None:
    if is_present('pkg_resources'):
        return None
    for new in (is_installed, get_installed_path):
        _replace(getattr(package_utils, new.__name__), new)
    return 'setuptools is missing or too new to have it; the standard library is asked instead'


FIX = Fix(
    name='pkg_resources',
    package='mmengine',
    patch=_patch,
    ends_with='an mmengine without pkg_resources (none as of 0.10.7), or setuptools below 81',
)
