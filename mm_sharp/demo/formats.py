"""People as COCO keypoint annotations, and as MMPose's ``MpiiDataset`` reads MPII.

In COCO, coordinates count from 0 at the centre of the top left pixel. In MPII they count from 1; ``scale`` is the
person's size (here the longer side of the box) over 200 pixels; ``center`` is 15 * scale pixels above the middle of the
box, since MMPose's reader moves it down by that much; a joint outside of the image is (-1, -1) with ``joints_vis`` 0,
and a hidden one inside counts as annotated, 1.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import savemat

from mm_sharp.demo.scene import Person, is_inside
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import COCO_KEYPOINTS, MPII_JOINTS

#: Pairs of keypoints, counted from 1, that are joined by a line; those of COCO.
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10], [9, 11],
    [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip

_HEAD = ('head_top', 'upper_neck', 'left_ear', 'right_ear', 'nose')
#: MATLAB's header begins with 116 bytes of free text; scipy writes the time of day there.
_MAT_TEXT = b'MATLAB 5.0 MAT-file, mm_sharp demo people'.ljust(116)

HeadBox = tuple[float, float, float, float]


def coco_image(image_id: int) -> dict[str, Any]:
    """The entry of an image; its file is named after its id."""
    return {'id': image_id, 'file_name': f'{image_id:06d}.png', 'width': WIDTH, 'height': HEIGHT}


def coco_annotation(person: Person, image_id: int, number: int) -> dict[str, Any]:
    """The annotation of person ``number`` (from 0) in an image."""
    return {
        'id': image_id * 10 + number,  # never 0, which COCO's evaluation takes for "no match"
        'image_id': image_id,
        'category_id': 1,
        'iscrowd': 0,
        'bbox': list(person.box),
        'area': person.area,
        'num_keypoints': sum(flag > 0 for _, _, flag in person.keypoints),
        'keypoints': [value for keypoint in person.keypoints for value in keypoint],
    }


def coco_file(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``person_keypoints_*.json``."""
    names = {'id': 1, 'name': 'person', 'supercategory': 'person'}
    return {
        'info': {'description': 'mm_sharp demo people', 'version': '1.0'},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [{**names, 'keypoints': list(COCO_KEYPOINTS), 'skeleton': SKELETON}],
    }


def mpii_record(person: Person, file_name: str) -> dict[str, Any]:
    """The record of one person."""
    left, top, width, height = person.box
    scale = max(width, height) / 200.0
    # MMPose takes left + width as the right edge of a box; so does this middle.
    centre = [left + width / 2 + 1, top + height / 2 + 1 - 15.0 * scale]
    points = [person.points[name] for name in MPII_JOINTS]
    return {
        'image': file_name,
        'center': [round(value, 4) for value in centre],
        'scale': scale,
        'joints': [[round(u + 1, 2), round(v + 1, 2)] if is_inside(u, v) else [-1.0, -1.0] for u, v in points],
        'joints_vis': [int(is_inside(u, v)) for u, v in points],
    }


def head_box(person: Person) -> HeadBox:
    """Left, top, right, bottom of the head, pixels counted from 1, also outside of the image."""
    across, down = zip(*(person.points[name] for name in _HEAD), strict=True)
    left, top, right, bottom = (round(end(axis) + 1, 2) for end in (min, max) for axis in (across, down))
    return (left, top, right, bottom)


def mat_file(records: list[dict[str, Any]], heads: list[HeadBox]) -> bytes:
    """The ground truth of n people, in the order of ``records``, as MATLAB data, the same bytes at any time."""
    corners: npt.NDArray[np.float64] = np.array(heads, np.float64).reshape(-1, 2, 2)
    joints = np.array([record['joints'] for record in records], np.float64)
    missing = 1.0 - np.array([record['joints_vis'] for record in records], np.float64)
    content = {
        'headboxes_src': np.transpose(corners, (1, 2, 0)),  # (2, 2, n): corner, then x and y
        'pos_gt_src': np.transpose(joints, (1, 2, 0)),  # (16, 2, n)
        'jnt_missing': missing.T,  # (16, n)
        'dataset_joints': np.array(MPII_JOINTS, dtype=object),
    }
    buffer = io.BytesIO()
    savemat(buffer, content)
    return _MAT_TEXT + buffer.getvalue()[len(_MAT_TEXT) :]
