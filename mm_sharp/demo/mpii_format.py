"""People as MMPose's ``MpiiDataset`` reads MPII: a list of records, and head boxes in a MATLAB file.

MPII's conventions, as that reader undoes them:

- coordinates count from 1, so a point (u, v) of ours is written as (u + 1, v + 1);
- ``scale`` is the person's size over 200 pixels: here the longer side of the box;
- ``center`` lies higher than the middle of the body. The reader moves it down by 15 * scale pixels, so it is
  written that much above the middle of the box, and the reader ends exactly there;
- a joint outside of the image is (-1, -1) with ``joints_vis`` 0; hidden joints inside count as annotated, 1;
- the head box's diagonal times 0.6 is the unit of PCKh. It is the box around the neck's upper end, the top of
  the head, the ears and the nose.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import savemat

from mm_sharp.demo.person import Person
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import MPII_JOINTS

_SCALE_UNIT = 200.0
_CENTRE_SHIFT = 15.0
_HEAD = ('head_top', 'upper_neck', 'left_ear', 'right_ear', 'nose')
#: MATLAB's header begins with 116 bytes of free text; scipy writes the time of day there.
_MAT_TEXT = b'MATLAB 5.0 MAT-file, mm_sharp demo people'.ljust(116)


def mpii_record(person: Person, file_name: str) -> dict[str, Any]:
    """The record of one person."""
    left, top, width, height = person.box
    scale = max(width, height) / _SCALE_UNIT
    joints, seen = [], []
    for name in MPII_JOINTS:
        u, v = person.points[name]
        inside = 0 <= u <= WIDTH - 1 and 0 <= v <= HEIGHT - 1
        joints.append([round(u + 1, 2), round(v + 1, 2)] if inside else [-1.0, -1.0])
        seen.append(int(inside))
    # MMPose takes left + width as the right edge of a box; so does this middle.
    centre = [left + width / 2 + 1, top + height / 2 + 1 - _CENTRE_SHIFT * scale]
    return {
        'image': file_name,
        'center': [round(value, 4) for value in centre],
        'scale': scale,
        'joints': joints,
        'joints_vis': seen,
    }


def head_box(person: Person) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the head, pixels counted from 1, also outside of the image."""
    across, down = zip(*(person.points[name] for name in _HEAD), strict=True)
    box = (min(across) + 1, min(down) + 1, max(across) + 1, max(down) + 1)
    return (round(box[0], 2), round(box[1], 2), round(box[2], 2), round(box[3], 2))


def mat_file(records: list[dict[str, Any]], heads: list[tuple[float, float, float, float]]) -> bytes:
    """The ground truth of n people as MATLAB data, the same bytes at any time.

    Args:
        records: of ``mpii_record``.
        heads: of ``head_box``, in the same order.

    Returns:
        A MAT file with ``headboxes_src`` (2, 2, n): corner, then x and y; ``pos_gt_src`` (16, 2, n),
        ``jnt_missing`` (16, n) and the joints' names.
    """
    corners: npt.NDArray[np.float64] = np.array(heads, np.float64).reshape(-1, 2, 2)
    joints = np.array([record['joints'] for record in records], np.float64)
    missing = 1.0 - np.array([record['joints_vis'] for record in records], np.float64)
    content = {
        'headboxes_src': np.transpose(corners, (1, 2, 0)),
        'pos_gt_src': np.transpose(joints, (1, 2, 0)),
        'jnt_missing': missing.T,
        'dataset_joints': np.array(MPII_JOINTS, dtype=object),
    }
    buffer = io.BytesIO()
    savemat(buffer, content)
    return _MAT_TEXT + buffer.getvalue()[len(_MAT_TEXT) :]
