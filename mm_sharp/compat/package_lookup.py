"""``pkg_resources``, which MMEngine needs to inherit configs.

Cause: ``mmengine.utils.is_installed`` and ``get_installed_path`` import ``pkg_resources``, which setuptools no
longer has from version 81 on. ``_base_ = ['mmpose::…']`` and ``mmengine.hub.get_config`` call them.

Repair: where ``pkg_resources`` is missing, both functions could only fail; they are replaced by ones that ask
the standard library. ``pkg_resources`` itself is not faked: other packages test for it and would then call
what a stand-in does not have.

Ends with: an mmengine that uses ``importlib.metadata`` (none as of 0.10.7), or setuptools below 81.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmengine.utils.package_utils as package_utils

from .fix import Fix
from .import_hook import is_present

_NAME = 'pkg_resources'
_ENDS = 'an mmengine without pkg_resources (none as of 0.10.7), or setuptools below 81'
_active = False


def install() -> None:
    """Replace the two functions, wherever they were imported to, if pkg_resources is missing."""
    global _active
    if _active or is_present('pkg_resources'):
        return
    _replace(package_utils.is_installed, is_installed)
    _replace(package_utils.get_installed_path, get_installed_path)
    _active = True


def describe() -> Fix:
    """Whether the functions were replaced."""
    if _active:
        reason = 'setuptools is missing or too new to have it; the standard library is asked instead'
        return Fix(_NAME, True, reason, _ENDS)
    return Fix(_NAME, False, 'setuptools has it', _ENDS)


def is_installed(package: str) -> bool:
    """Whether a distribution or a module of this name is installed.

    Args:
        package: e.g. ``'mmpose'`` or ``'mmsegmentation'``.
    """
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return _module_folder(package) is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of an installed package's module.

    Args:
        package: name of a distribution, e.g. ``'mmpose'`` or ``'mmsegmentation'``, or of a module.

    Raises:
        ModuleNotFoundError: there is neither, or it is a namespace package, which has no folder of its own.
    """
    folder = _module_folder(package)
    if folder is not None:
        return folder
    try:
        names = importlib.metadata.distribution(package).read_text('top_level.txt') or ''
    except importlib.metadata.PackageNotFoundError:
        names = ''
    for name in names.split():  # a distribution named otherwise than its module
        folder = _module_folder(name)
        if folder is not None:
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
