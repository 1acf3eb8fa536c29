"""xtcocotools, which MMPose imports, missing or compiled against another numpy: faster-coco-eval stands in.

xtcocotools 1.14.3 has wheels for Python up to 3.11 only, which fail beside numpy 2.
"""

from __future__ import annotations

import importlib
from functools import partial
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from .fix import Fix, is_present

_PACKAGE = 'xtcocotools'
# Whose names each module has; the package itself has none.
_COCO = 'mm_sharp.compat.coco_stand_in'
_SOURCES = {'coco': _COCO, 'cocoeval': _COCO, 'mask': 'faster_coco_eval.core.mask'}
_NAMES = _PACKAGE, *(f'{_PACKAGE}.{part}' for part in _SOURCES)


class _StandIn(Loader):
    """Fills a module named ``xtcocotools.*``."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the usual module object

    def exec_module(self, module: ModuleType) -> None:
        source = _SOURCES.get(module.__name__.rpartition('.')[2])
        if source is not None:
            names = vars(importlib.import_module(source))
            vars(module).update({name: value for name, value in names.items() if not name.startswith('_')})


@partial(Fix, _PACKAGE, 'an xtcocotools with wheels for this Python and numpy', before=_NAMES, stand_in=_StandIn())
def fix_xtcocotools(module: str) -> str | None:
    if not is_present(_PACKAGE):
        cause = 'xtcocotools is not installed'
    elif module == _PACKAGE:
        return None  # its __init__ is trivial; whether the package works shows in its parts
    else:
        try:
            importlib.import_module('xtcocotools._mask')
            return None
        except Exception as error:  # numpy's check raises ValueError, ImportError or AttributeError
            cause = f"xtcocotools' compiled part does not load ({str(error).splitlines()[0]})"
    if not is_present('faster_coco_eval'):
        raise ModuleNotFoundError(
            f'{cause}, and faster-coco-eval, which could stand in, is not installed: pip install faster-coco-eval',
            name=_PACKAGE,
        )
    return f'{cause}; faster-coco-eval stands in'
