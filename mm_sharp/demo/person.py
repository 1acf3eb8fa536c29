"""What a picture shows of a person: keypoints and which of them are seen, box and area."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mm_sharp.demo.body import own_parts
from mm_sharp.demo.camera import Camera
from mm_sharp.demo.render import Layer, Mask
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import COCO_KEYPOINTS, Points

#: Pixel coordinates (u, v), and COCO's flag (0 outside, 1 hidden, 2 seen).
Keypoint = tuple[float, float, int]


@dataclass(frozen=True)
class Person:
    """What is known about one person in a picture.

    Attributes:
        keypoints: for each COCO keypoint (u, v, flag); pixels, centres at whole numbers. The flag
            is 2 where the keypoint is seen, 1 where the person's own body, another person or an
            object hides it, 0 (and u = v = 0) outside of the image.
        points: exact pixel coordinates of every point of the skeleton, also outside of the image,
            rounded to 1/100 pixel.
        box: left, top, width, height of the body's outline inside the image, whole pixels.
            What an object or another person covers is part of it, as the keypoints there are.
        area: number of pixels of the image that show this person.
    """

    keypoints: tuple[Keypoint, ...]
    points: dict[str, tuple[float, float]]
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Figure:
    """A person before it is judged: points in camera coordinates, its own layer, its girth."""

    seen: Points
    layer: Layer
    girth: float


def judge(figure: Figure, shown: Mask, camera: Camera) -> Person:
    """What the picture shows of a person.

    Args:
        figure: the person, drawn.
        shown: (H, W), the pixels of the picture that show this person.
        camera: with which the figure was drawn.
    """
    points = {}
    for name, point in figure.seen.items():
        u, v = camera.project(point)
        points[name] = (round(u, 2), round(v, 2))
    keypoints = []
    for name in COCO_KEYPOINTS:
        u, v = points[name]
        if not (0 <= u <= WIDTH - 1 and 0 <= v <= HEIGHT - 1):
            keypoints.append((0.0, 0.0, 0))
            continue
        visible = _is_seen(name, figure, shown, (math.floor(u + 0.5), math.floor(v + 0.5)))
        keypoints.append((u, v, 2 if visible else 1))
    return Person(tuple(keypoints), points, _outline_box(figure.layer.mask), int(shown.sum()))


def _is_seen(name: str, figure: Figure, shown: Mask, pixel: tuple[int, int]) -> bool:
    """Whether the pixel shows the keypoint's own part, not far in front of the keypoint."""
    parts, depth = own_parts(name)
    u, v = pixel
    return bool(
        shown[v, u]
        and int(figure.layer.part[v, u]) in parts
        and figure.seen[name][2] - figure.layer.depth[v, u] <= depth * figure.girth
    )


def _outline_box(mask: Mask) -> tuple[int, int, int, int]:
    """Left, top, width, height of a mask, pixels; all zero if it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return (0, 0, 0, 0)
    left, top = int(columns[0]), int(rows[0])
    return (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
