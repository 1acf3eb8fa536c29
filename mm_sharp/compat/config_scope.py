"""``mm_sharp::…`` in configs.

Cause: MMEngine resolves ``_base_ = ['mmpose::…']`` and ``mmengine.hub.get_config`` for the packages of a fixed
table. It then looks for ``<package>/.mim/configs``, and marks what it reads with the package's name as the
registry scope.

Repair: enter ``mm_sharp`` in the table, and leave the mark away for our configs. We have no registries of our
own (every name is in MMEngine's root registries), so a mark would only hide the scope that the inheriting
config has chosen, usually ``mmpose``.

This works once ``mm_sharp`` has been imported, as our tools do. ``custom_imports`` in the inheriting config is
too late, since bases are read first: with MMPose's own tools, name the base by its path instead.

Ends with: an mmengine whose table is open to other packages (none as of 0.10.7).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from .fix import Fix

_NAME = 'mm_sharp:: configs'
_ENDS = 'an mmengine whose table of packages is open (none as of 0.10.7)'
_SCOPE = 'mm_sharp'
# MMEngine turns this name into a folder: that of the distribution if there is one of this name, else that
# of the module. Asking for the distribution 'mm_sharp' would fail in an editable install, whose files are
# not beside its metadata; the name of a module in our folder leads to the folder in every kind of install.
_LOCATOR = 'mm_sharp.doctor'

PathAndScope = tuple[str, str | None]


def install() -> None:
    """Make ``mm_sharp::…`` known; a second call changes nothing."""
    if MODULE2PACKAGE.setdefault(_SCOPE, _LOCATOR) != _LOCATOR:
        return  # this mmengine knows us by itself
    current = Config._get_cfg_path
    if not hasattr(current, '__wrapped__'):
        Config._get_cfg_path = staticmethod(_without_our_scope(current))


def describe() -> Fix:
    """Whether ``mm_sharp::…`` resolves to a folder that is there."""
    folder = Path(__file__).parents[1] / '.mim' / 'configs'
    if not folder.is_dir():
        return Fix(_NAME, False, f'{folder} is missing: reinstall mm_sharp', _ENDS)
    return Fix(_NAME, True, f'resolved to {folder}', _ENDS)


def _without_our_scope(
    get_cfg_path: Callable[[str, str], PathAndScope],
) -> Callable[[str, str], PathAndScope]:
    @functools.wraps(get_cfg_path)
    def wrapper(cfg_path: str, filename: str) -> PathAndScope:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == _SCOPE else scope

    return wrapper
