"""``tostring_rgb`` of matplotlib's canvas, which MMPose's 3-D visualizer calls.

Cause: matplotlib 3.10 removed ``FigureCanvasAgg.tostring_rgb``; MMPose 1.3.2's ``Pose3dLocalVisualizer`` turns
its figure into pixels by it.

Repair: where the method is missing, add one of the same meaning just before that visualizer is imported.

Ends with: an mmpose whose visualizer uses ``buffer_rgba`` (none as of 1.3.2).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'matplotlib canvas'
_ENDS = 'an mmpose whose 3-D visualizer uses buffer_rgba (none as of 1.3.2)'
_active = False


def install() -> None:
    """Arrange for the repair to run if MMPose's 3-D visualizer is imported later."""
    before_import('mmpose.visualization.local_visualizer_3d', _repair)


def describe() -> Fix:
    """Whether the method was added; MMPose's visualizers should have been imported before."""
    if _active:
        return Fix(_NAME, True, 'matplotlib has no tostring_rgb any more, which 3-D pose is drawn with', _ENDS)
    if not is_present('mmpose'):
        return Fix(_NAME, False, 'mmpose is not installed', _ENDS)
    return Fix(_NAME, False, "matplotlib has tostring_rgb, or MMPose's visualizers were not imported", _ENDS)


def _repair(name: str) -> None:
    """Add the method if it is missing."""
    global _active
    canvas: Any = importlib.import_module('matplotlib.backends.backend_agg').FigureCanvasAgg
    if not hasattr(canvas, 'tostring_rgb'):
        canvas.tostring_rgb = _tostring_rgb
        _active = True


def _tostring_rgb(self: Any) -> bytes:
    """The drawn figure as bytes, three (red, green, blue) a pixel, row by row."""
    return np.asarray(self.buffer_rgba())[..., :3].tobytes()
