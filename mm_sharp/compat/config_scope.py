"""``mm_sharp::…`` in configs.

Cause: MMEngine resolves ``_base_ = ['mmpose::…']`` and ``mmengine.hub.get_config`` for the packages of a fixed table.
It looks for ``<package>/.mim/configs``, and marks what it reads with the package's name as the registry scope.

Fix: enter ``mm_sharp`` in the table, and leave the mark away for our configs. All our names are in MMEngine's root
registries, so a mark would only hide the scope of the inheriting config, usually ``mmpose``.

This works once ``mm_sharp`` has been imported. MMEngine reads ``_base_`` before it obeys ``custom_imports``: with
MMPose's own tools, name the base by its path instead.
"""

from __future__ import annotations

import functools
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from .fix import Fix

_SCOPE = 'mm_sharp'
# MMEngine turns this name into a folder: that of the distribution of this name, else that of the module. The
# distribution 'mm_sharp' has no files beside its metadata in an editable install; this module is always in our folder.
_LOCATOR = 'mm_sharp.errors'


def _patch(module: str) -> str | None:
    if MODULE2PACKAGE.setdefault(_SCOPE, _LOCATOR) != _LOCATOR:
        return None  # this mmengine knows us by itself
    get_cfg_path = Config._get_cfg_path

    @functools.wraps(get_cfg_path)
    def without_our_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == _SCOPE else scope

    Config._get_cfg_path = staticmethod(without_our_scope)
    return f'resolved to {Path(__file__).parents[1] / ".mim" / "configs"}'


FIX = Fix(
    name='mm_sharp:: configs',
    package='mmengine',
    patch=_patch,
    ends_with='an mmengine whose table of packages is open (none as of 0.10.7)',
)
