"""What MMPose imports and uses, where it is missing or broken.

A torchvision for CUDA does not import beside a CPU torch, since it registers shape functions for two operators of its
library: these are defined just before, and raise when they are called. ``mmcv.ops`` asks for ``mmcv._ext``, which
mmcv-lite lacks: its loader hands out stand-ins, which raise. ``mmcv._ext`` itself is not faked: MMEngine looks for it
in ``mmcv_full_available``. xtcocotools 1.14.3 has wheels for Python up to 3.11 only, which fail beside numpy 2:
faster-coco-eval stands in. NumPy has no bfloat16, so every head that logs an accuracy fails under bfloat16 autocast:
``to_numpy`` gets float32 copies. matplotlib 3.10 removed ``tostring_rgb``, by which ``Pose3dLocalVisualizer`` makes
pixels: it is added again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch

from .fix import Fix, is_present

# A torch.library.Library takes its operators with it when it is collected, hence a reference for good.
_library: torch.library.Library | None = None
# Which of the two is imported first, after the library was tried, depends on torchvision's version.
_REGISTRATIONS = 'torchvision._autograd_registrations', 'torchvision._meta_registrations'
# mmcv.utils.collect_env calls these two as soon as mmcv.ops imports: they report, they don't compute.
_REPORTS = ('get_compiler_version', 'get_compiling_cuda_version')
_PACKAGE = 'xtcocotools'
# Whose names each module has; the package itself has none.
_COCO = 'mm_sharp.compat.coco_stand_in'
_SOURCES = {'coco': _COCO, 'cocoeval': _COCO, 'mask': 'faster_coco_eval.core.mask'}
_NAMES = _PACKAGE, *(f'{_PACKAGE}.{part}' for part in _SOURCES)
_VISUALIZER = 'mmpose.visualization.local_visualizer_3d'


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


@partial(Fix, 'bfloat16 arrays', 'an mmpose whose to_numpy takes it (none as of 1.3.2)', before=('mmpose.models',))
def fix_bfloat16(module: str) -> str | None:
    utils: Any = importlib.import_module('mmpose.utils.tensor_utils')
    to_numpy = utils.to_numpy
    try:
        to_numpy(torch.zeros(1, dtype=torch.bfloat16))
        return None
    except TypeError:

        @wraps(to_numpy)
        def wrapper(x: Any, return_device: bool = False, unzip: bool = False) -> Any:
            return to_numpy(_widen(x), return_device, unzip)

        utils.to_numpy = wrapper
        return "mmpose's heads cannot log accuracy under bfloat16 autocast"


def _widen(x: Any) -> Any:
    """``x``, a tensor or several, with float32 for bfloat16."""
    if isinstance(x, torch.Tensor):
        return x.float() if x.dtype == torch.bfloat16 else x
    return [_widen(item) for item in x] if isinstance(x, (list, tuple)) else x


@partial(Fix, 'matplotlib canvas', 'an mmpose that uses buffer_rgba (none as of 1.3.2)', before=(_VISUALIZER,))
def fix_canvas(module: str) -> str | None:
    canvas: Any = importlib.import_module('matplotlib.backends.backend_agg').FigureCanvasAgg
    if hasattr(canvas, 'tostring_rgb'):
        return None
    canvas.tostring_rgb = lambda self: np.asarray(self.buffer_rgba())[..., :3].tobytes()
    return 'matplotlib no longer has tostring_rgb, by which MMPose draws 3-D poses'
