"""A contact sheet of a data set, with its annotations drawn in, for people to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mm_sharp.demo.folder import COCO, PREVIEW
from mm_sharp.demo.formats import SKELETON
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import COCO_KEYPOINTS

Image = npt.NDArray[np.uint8]

_ZOOM, _COLUMNS = 2, 8
_SIZE = (WIDTH * _ZOOM, HEIGHT * _ZOOM)
#: BGR: the person's left is green, the right orange, the middle white.
_COLOURS = {'left': (80, 220, 60), 'right': (0, 140, 255), 'nose': (255, 255, 255)}


def write_preview(folder: Path | str, count: int) -> Path:
    """Write the first ``count`` training images with their annotations into ``preview.png``, and return its path.

    Keypoints that are seen are filled, hidden ones are rings.
    """
    folder = Path(folder)
    content = json.loads((folder / COCO['train']).read_text(encoding='utf-8'))
    images = content['images'][:count]
    columns = min(_COLUMNS, len(images))
    sheet = np.zeros((-(-len(images) // columns), columns, *reversed(_SIZE), 3), np.uint8)
    for number, image in enumerate(images):
        people = [a for a in content['annotations'] if a['image_id'] == image['id']]
        sheet[divmod(number, columns)] = _annotated(folder / 'train' / image['file_name'], people)
    path = folder / PREVIEW
    picture = sheet.swapaxes(1, 2).reshape(sheet.shape[0] * _SIZE[1], columns * _SIZE[0], 3)
    if not cv2.imwrite(str(path), picture):
        raise OSError(f'could not write {path}')
    return path


def _annotated(path: Path, people: list[dict[str, Any]]) -> Image:
    """One image, enlarged, with the annotations of its people."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise OSError(f'could not read {path}')
    canvas: Image = cv2.resize(picture, _SIZE, interpolation=cv2.INTER_NEAREST)
    for person in people:
        left, top, width, height = (_ZOOM * value for value in person['bbox'])
        cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), (200, 200, 200), 1)
        _draw_keypoints(canvas, np.reshape(person['keypoints'], (-1, 3)).tolist())
    return canvas


def _draw_keypoints(canvas: Image, keypoints: list[list[float]]) -> None:
    spots = [(round(_ZOOM * (u + 0.5)), round(_ZOOM * (v + 0.5))) for u, v, _ in keypoints]
    for first, second in SKELETON:
        if keypoints[first - 1][2] and keypoints[second - 1][2]:
            cv2.line(canvas, spots[first - 1], spots[second - 1], (230, 230, 230), 1, cv2.LINE_AA)
    for name, spot, (_, _, flag) in zip(COCO_KEYPOINTS, spots, keypoints, strict=True):
        if flag:
            cv2.circle(canvas, spot, 4, _COLOURS[name.split('_')[0]], -1 if flag == 2 else 1, cv2.LINE_AA)
