"""Compiled operators of torchvision and mmcv that do not load; each raises when it is called, and not before.

A torchvision for CUDA does not import beside a CPU torch, since it registers shape functions for two operators of its
library: these are defined just before. What is imported before mm_sharp cannot be patched, but can be imported again.
``mmcv.ops`` asks for ``mmcv._ext``, which mmcv-lite lacks: its loader hands out stand-ins. ``mmcv._ext`` itself is not
faked: MMEngine looks for it in ``mmcv_full_available``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from .fix import Fix

# A torch.library.Library takes its operators with it when it is collected, hence a reference for good.
_library: torch.library.Library | None = None
# Which of the two is imported first, after the library was tried, depends on torchvision's version.
_REGISTRATIONS = 'torchvision._autograd_registrations', 'torchvision._meta_registrations'
# mmcv.utils.collect_env calls these two as soon as mmcv.ops imports: they report, they don't compute.
_REPORTS = ('get_compiler_version', 'get_compiling_cuda_version')


class MissingOperatorError(RuntimeError):
    """A compiled mmcv operator was called where none are installed."""


@partial(Fix, 'torchvision operators', 'a torchvision built for the installed torch', before=_REGISTRATIONS)
def fix_torchvision(module: str) -> str | None:
    global _library
    extension = sys.modules.get('torchvision.extension')
    if extension is None or extension._has_ops() or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    _library = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, operator):
            _library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            _library.impl(operator, _missing_in_torchvision(operator), 'CPU')
    return (
        f"torch {torch.__version__} has no CUDA and torchvision's compiled operators don't load; torchvision imports, "
        'calling nms raises. Import mm_sharp before torchvision, timm, mmpretrain and mmpose: '
        "without it their import ends with 'operator torchvision::nms does not exist'"
    )


def _missing_in_torchvision(operator: str):  # type: ignore[no-untyped-def]  # torch inspects the signature
    def missing(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> NoReturn:
        cause = f"the installed torchvision's does not load beside torch {torch.__version__}"
        advice = 'Install the torchvision wheel that was built for this torch.'
        raise RuntimeError(f'torchvision::{operator} is compiled code, and {cause}. {advice}')

    return missing


@partial(Fix, 'mmcv operators', 'a full mmcv built for the installed torch', before=('mmcv.ops',))
def fix_mmcv(module: str) -> str | None:
    try:
        importlib.import_module('mmcv._ext')
        return None
    except ModuleNotFoundError:
        cause = 'mmcv-lite has no compiled operators'
    except ImportError as error:  # built against another torch: undefined symbols
        cause = f"mmcv's compiled operators don't load ({str(error).splitlines()[0]})"

    def load_ext(name: str, funcs: Sequence[str]) -> SimpleNamespace:
        stand_ins = ((lambda: 'n/a') if func in _REPORTS else _missing_in_mmcv(func, cause) for func in funcs)
        return SimpleNamespace(**dict(zip(funcs, stand_ins, strict=True)))

    loader: Any = importlib.import_module('mmcv.utils.ext_loader')
    loader.load_ext = load_ext
    return f'{cause}; mmcv.ops imports, a call of an operator raises'


def _missing_in_mmcv(operator: str, cause: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(
            f'the mmcv operator {operator!r} is compiled code, and {cause}. Models that run it need a full mmcv built '
            f'for torch {torch.__version__}: pip uninstall -y mmcv-lite mmcv && pip install --no-binary mmcv '
            '--no-build-isolation "mmcv>=2.0.0,<2.2.0" (this compiles for a long time)'
        )

    return missing
