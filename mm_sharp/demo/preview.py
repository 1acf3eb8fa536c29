"""A contact sheet of a data set, with its annotations drawn in, for people to look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mm_sharp.demo.coco_format import SKELETON
from mm_sharp.demo.folder import PREVIEW, coco_path
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import COCO_KEYPOINTS

Image = npt.NDArray[np.uint8]

_ZOOM, _COLUMNS = 2, 8
#: BGR: the person's left is green, the right orange, the middle white.
_COLOURS = {'left': (80, 220, 60), 'right': (0, 140, 255), 'middle': (255, 255, 255)}


def write_preview(folder: Path | str, count: int, split: str = 'train') -> Path:
    """Write the first images of a split with boxes and keypoints into ``preview.png``.

    Seen keypoints are filled, hidden ones are rings.

    Args:
        folder: of a complete data set.
        count: number of images, at least 1; no more than there are.
        split: 'train' or 'val'.

    Returns:
        The path of the picture.

    Raises:
        ValueError: if count is below 1.
        OSError: if the annotations or an image can't be read, or the picture not be written.
    """
    if count < 1:
        raise ValueError(f'preview={count} must be at least 1')
    folder = Path(folder)
    content = json.loads((folder / coco_path(split)).read_text(encoding='utf-8'))
    tiles = []
    for image in content['images'][:count]:
        people = [a for a in content['annotations'] if a['image_id'] == image['id']]
        tiles.append(_annotated(folder / split / image['file_name'], people))
    columns = min(_COLUMNS, len(tiles))
    blank = np.zeros((HEIGHT * _ZOOM, WIDTH * _ZOOM, 3), np.uint8)
    tiles += [blank] * (math.ceil(len(tiles) / columns) * columns - len(tiles))
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    path = folder / PREVIEW
    if not cv2.imwrite(str(path), np.vstack(rows)):
        raise OSError(f'could not write {path}')
    return path


def _annotated(path: Path, people: list[dict[str, Any]]) -> Image:
    """One image, enlarged, with the annotations of its people."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise OSError(f'could not read {path}')
    size = (WIDTH * _ZOOM, HEIGHT * _ZOOM)
    canvas: Image = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    for person in people:
        left, top, width, height = (_ZOOM * value for value in person['bbox'])
        corners = (left, top), (left + width - 1, top + height - 1)
        cv2.rectangle(canvas, *corners, (200, 200, 200), 1)
        _draw_keypoints(canvas, person['keypoints'])
    return canvas


def _draw_keypoints(canvas: Image, flat: list[float]) -> None:
    keypoints = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    spots = [(round(_ZOOM * (u + 0.5)), round(_ZOOM * (v + 0.5))) for u, v, _ in keypoints]
    for first, second in SKELETON:
        if keypoints[first - 1][2] and keypoints[second - 1][2]:
            cv2.line(canvas, spots[first - 1], spots[second - 1], (230, 230, 230), 1, cv2.LINE_AA)
    for name, spot, (_, _, flag) in zip(COCO_KEYPOINTS, spots, keypoints, strict=True):
        side = name.split('_')[0] if '_' in name else 'middle'
        if flag:
            cv2.circle(canvas, spot, 4, _COLOURS[side], -1 if flag == 2 else 1, cv2.LINE_AA)
