"""Arrays in MMPose.

**bfloat16**: NumPy has none, and MMPose 1.3.2's ``to_numpy`` hands tensors over as they are. Every head that logs an
accuracy calls it, and so fails under bfloat16 autocast, with any optimizer wrapper. Fix: before the heads import it by
name, it gets float32 copies of bfloat16 tensors.

**Pixels**: matplotlib 3.10 removed ``FigureCanvasAgg.tostring_rgb``, by which MMPose 1.3.2's ``Pose3dLocalVisualizer``
turns its figure into pixels. Fix: a method of the same meaning is added before that visualizer is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch

from .fix import Fix


def _patch_to_numpy(module: str) -> str | None:
    utils: Any = importlib.import_module('mmpose.utils.tensor_utils')
    to_numpy = utils.to_numpy
    try:
        to_numpy(torch.zeros(1, dtype=torch.bfloat16))
        return None
    except TypeError:

        @functools.wraps(to_numpy)
        def wrapper(x: Any, return_device: bool = False, unzip: bool = False) -> Any:
            return to_numpy(_widen(x), return_device, unzip)

        utils.to_numpy = wrapper
        return "mmpose's heads cannot log accuracy under bfloat16 autocast"


def _widen(x: Any) -> Any:
    """``x``, a tensor or several, with float32 for bfloat16."""
    if isinstance(x, torch.Tensor):
        return x.float() if x.dtype == torch.bfloat16 else x
    return [_widen(item) for item in x] if isinstance(x, (list, tuple)) else x


def _patch_canvas(module: str) -> str | None:
    canvas: Any = importlib.import_module('matplotlib.backends.backend_agg').FigureCanvasAgg
    if hasattr(canvas, 'tostring_rgb'):
        return None
    canvas.tostring_rgb = lambda self: np.asarray(self.buffer_rgba())[..., :3].tobytes()
    return 'matplotlib no longer has tostring_rgb, by which MMPose draws 3-D poses'


BFLOAT16 = Fix(
    name='bfloat16 arrays',
    patch=_patch_to_numpy,
    ends_with='an mmpose whose to_numpy takes bfloat16 (none as of 1.3.2)',
    before=('mmpose.models',),
)
CANVAS = Fix(
    name='matplotlib canvas',
    patch=_patch_canvas,
    ends_with='an mmpose whose 3-D visualizer uses buffer_rgba (none as of 1.3.2)',
    before=('mmpose.visualization.local_visualizer_3d',),
)
