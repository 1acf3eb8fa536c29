"""mmcv-lite, or an mmcv whose compiled operators do not load.

Cause: ``import mmpose.models`` imports ``mmcv.ops`` unguarded (EDPose and others; MMDetection too), and
``mmcv.ops`` asks for ``mmcv._ext`` at import. mmcv-lite has none, no wheel of the full mmcv exists for
current versions of torch, and building one takes most of an hour. Yet hardly any model runs such an operator.

Repair: where ``mmcv._ext`` is missing or fails to import, ``mmcv.utils.ext_loader.load_ext`` hands out
functions that raise when they are *called*. ``mmcv._ext`` itself is not faked: MMEngine looks for it to
decide whether operators exist (``mmcv_full_available``), and must go on seeing that they don't.

Ends with: a full mmcv built for the installed torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'mmcv operators'
_ENDS = 'a full mmcv built for the installed torch'
# mmcv.utils.collect_env calls these two as soon as mmcv.ops imports: they report, they don't compute.
_REPORTS = ('get_compiler_version', 'get_compiling_cuda_version')
_cause: str | None = None


class MissingOperatorError(RuntimeError):
    """A compiled mmcv operator was called where none are installed."""


def install() -> None:
    """Arrange for the repair to run if ``mmcv.ops`` is imported later."""
    before_import('mmcv.ops', _repair)


def describe() -> Fix:
    """Whether operators were replaced by functions that raise; ``mmcv.ops`` should have been imported."""
    if _cause is not None:
        return Fix(_NAME, True, f'{_cause}; mmcv.ops imports, a call of an operator raises', _ENDS)
    if not is_present('mmcv'):
        return Fix(_NAME, False, 'mmcv is not installed', _ENDS)
    if not is_present('mmcv._ext'):
        return Fix(_NAME, False, 'mmcv.ops was not imported', _ENDS)
    return Fix(_NAME, False, "mmcv's compiled operators are there", _ENDS)


def _repair(name: str) -> None:
    """Patch ``load_ext`` if the compiled module is missing or broken."""
    global _cause
    try:
        importlib.import_module('mmcv._ext')
    except ModuleNotFoundError:
        _cause = 'mmcv-lite has no compiled operators'
    except ImportError as error:  # built against another torch: undefined symbols
        _cause = f"mmcv's compiled operators don't load ({str(error).splitlines()[0]})"
    else:
        return
    loader: Any = importlib.import_module('mmcv.utils.ext_loader')
    loader.load_ext = _load_stand_ins


def _load_stand_ins(name: str, funcs: Sequence[str]) -> SimpleNamespace:
    """Same call as ``mmcv.utils.ext_loader.load_ext``: an object with the functions ``funcs``."""
    return SimpleNamespace(**{func: _report if func in _REPORTS else _raiser(func) for func in funcs})


def _report() -> str:
    return 'n/a'


def _raiser(operator: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(
            f'the mmcv operator {operator!r} is compiled code, and {_cause}. Models that run it need a full '
            f'mmcv built for torch {torch.__version__}: pip uninstall -y mmcv-lite mmcv && '
            'pip install --no-binary mmcv --no-build-isolation "mmcv>=2.0.0,<2.2.0" (this compiles for a '
            'long time)'
        )

    missing.__name__ = operator
    return missing
