"""``tostring_rgb`` of matplotlib's canvas.

Cause: matplotlib 3.10 removed ``FigureCanvasAgg.tostring_rgb``, by which MMPose 1.3.2's ``Pose3dLocalVisualizer`` turns
its figure into pixels.

Fix: where the method is missing, one of the same meaning is added before that visualizer is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .fix import Fix


def _patch(module: str) -> str | None:
    canvas: Any = importlib.import_module('matplotlib.backends.backend_agg').FigureCanvasAgg
    if hasattr(canvas, 'tostring_rgb'):
        return None
    # Three bytes a pixel, row by row.
    canvas.tostring_rgb = lambda self: np.asarray(self.buffer_rgba())[..., :3].tobytes()
    return 'matplotlib no longer has tostring_rgb, by which MMPose draws 3-D poses'


FIX = Fix(
    name='matplotlib canvas',
    package='mmpose',
    patch=_patch,
    ends_with='an mmpose whose 3-D visualizer uses buffer_rgba (none as of 1.3.2)',
    before=('mmpose.visualization.local_visualizer_3d',),
)
