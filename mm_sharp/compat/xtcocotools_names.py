"""xtcocotools missing, or compiled against another numpy.

Cause: xtcocotools 1.14.3, which MMPose imports for data sets and metrics, has wheels for Python up to 3.11
only, and these are compiled against numpy 1: beside numpy 2 they fail at import.

Repair: where ``xtcocotools._mask`` (its compiled part) cannot be imported, the names that MMPose imports are
served by ``coco_stand_in`` and ``coco_eval_stand_in``, on top of faster-coco-eval. Where it can, nothing
changes.

Ends with: an xtcocotools with wheels for the installed Python and numpy (none as of 1.14.3).
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'xtcocotools'
_ENDS = 'an xtcocotools with wheels for the installed Python and numpy'
_SUBMODULES = ('coco', 'cocoeval', 'mask')
_cause: str | None = None


def install() -> None:
    """Arrange for the repair to run if xtcocotools is imported later."""
    for name in ('xtcocotools', *(f'xtcocotools.{part}' for part in _SUBMODULES)):
        before_import(name, _repair)


def describe() -> Fix:
    """Whether faster-coco-eval stands in; ``xtcocotools.mask`` should have been imported before."""
    if _cause is not None and 'xtcocotools.mask' in sys.modules:
        return Fix(_NAME, True, f'{_cause}; faster-coco-eval stands in', _ENDS)
    if _cause is not None:
        return Fix(_NAME, False, f'{_cause}, and faster-coco-eval, which could stand in, is not installed', _ENDS)
    if not is_present('xtcocotools'):
        return Fix(_NAME, False, 'xtcocotools is neither installed nor was it imported', _ENDS)
    return Fix(_NAME, False, 'xtcocotools itself works', _ENDS)


def _repair(name: str) -> ModuleSpec | None:
    """The spec of a stand-in for ``name``, or None where the real package works."""
    global _cause
    if name == 'xtcocotools':
        if is_present(name):
            return None  # its __init__ is trivial; whether the package works shows in its parts
        _cause = 'xtcocotools is not installed'
    elif _cause is None:
        _cause = _why_broken()
    if _cause is None:
        return None
    return ModuleSpec(name, _StandInLoader(), is_package=name == 'xtcocotools')


def _why_broken() -> str | None:
    """Why xtcocotools' compiled part can't be imported; None if it can."""
    try:
        importlib.import_module('xtcocotools._mask')
    except Exception as error:  # numpy's ABI check raises ValueError, ImportError or AttributeError
        return f"xtcocotools' compiled part does not load ({str(error).splitlines()[0]})"
    return None


class _StandInLoader(Loader):
    """Fills a module named ``xtcocotools.*`` with our stand-in's names."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the usual module object

    def exec_module(self, module: ModuleType) -> None:
        part = module.__name__.rpartition('.')[2]
        if not is_present('faster_coco_eval'):
            raise ModuleNotFoundError(
                f'{_cause}, and faster-coco-eval, which could stand in for it, is not installed: '
                'pip install faster-coco-eval',
                name='xtcocotools',
            )
        if part == 'coco':
            module.COCO = importlib.import_module('mm_sharp.compat.coco_stand_in').COCO  # type: ignore[attr-defined]
        elif part == 'cocoeval':
            stand_in = importlib.import_module('mm_sharp.compat.coco_eval_stand_in')
            module.COCOeval, module.Params = stand_in.COCOeval, stand_in.Params  # type: ignore[attr-defined]
        elif part == 'mask':
            mask = importlib.import_module('faster_coco_eval.core.mask')
            for function in ('encode', 'decode', 'area', 'toBbox', 'iou', 'merge', 'frPyObjects'):
                setattr(module, function, getattr(mask, function))
