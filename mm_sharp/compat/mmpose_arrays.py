"""Arrays in MMPose.

NumPy has no bfloat16, so every head that logs an accuracy fails under bfloat16 autocast: ``to_numpy`` gets float32
copies. matplotlib 3.10 removed ``tostring_rgb``, by which ``Pose3dLocalVisualizer`` makes pixels: it is added again.
"""

from __future__ import annotations

import importlib
from functools import partial, wraps
from typing import Any

import numpy as np
import torch

from .fix import Fix

_VISUALIZER = 'mmpose.visualization.local_visualizer_3d'


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
