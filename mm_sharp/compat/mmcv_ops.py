"""mmcv-lite, or an mmcv whose compiled operators do not load.

Cause: MMPose's and MMDetection's models import ``mmcv.ops``, which asks for ``mmcv._ext`` at import. mmcv-lite has
none, there is no wheel of the full mmcv for current versions of torch, and building one takes most of an hour. Yet
hardly any model runs such an operator.

Fix: where ``mmcv._ext`` does not import, ``mmcv.utils.ext_loader.load_ext`` hands out functions that raise when they
are called. ``mmcv._ext`` itself is not faked: MMEngine looks for it to see whether there are operators
(``mmcv_full_available``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from .fix import Fix

# mmcv.utils.collect_env calls these two as soon as mmcv.ops imports: they report, they don't compute.
_REPORTS = ('get_compiler_version', 'get_compiling_cuda_version')


class MissingOperatorError(RuntimeError):
    """A compiled mmcv operator was called where none are installed."""


def _patch(module: str) -> str | None:
    try:
        importlib.import_module('mmcv._ext')
        return None
    except ModuleNotFoundError:
        cause = 'mmcv-lite has no compiled operators'
    except ImportError as error:  # built against another torch: undefined symbols
        cause = f"mmcv's compiled operators don't load ({str(error).splitlines()[0]})"

    def load_ext(name: str, funcs: Sequence[str]) -> SimpleNamespace:
        return SimpleNamespace(**{func: _report if func in _REPORTS else _raiser(func, cause) for func in funcs})

    loader: Any = importlib.import_module('mmcv.utils.ext_loader')
    loader.load_ext = load_ext
    return f'{cause}; mmcv.ops imports, a call of an operator raises'


def _report() -> str:
    return 'n/a'


def _raiser(operator: str, cause: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(
            f'the mmcv operator {operator!r} is compiled code, and {cause}. Models that run it need a full mmcv built '
            f'for torch {torch.__version__}: pip uninstall -y mmcv-lite mmcv && pip install --no-binary mmcv '
            '--no-build-isolation "mmcv>=2.0.0,<2.2.0" (this compiles for a long time)'
        )

    return missing


FIX = Fix(
    name='mmcv operators',
    package='mmcv',
    patch=_patch,
    ends_with='a full mmcv built for the installed torch',
    before=('mmcv.ops',),
)
