"""A made-up archive in the form of Leeds Sports Pose Extended's: people are coloured discs at their joints."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from scipy.io import savemat

RADIUS = 6
# BGR by joint, all of them far from the grey of the background and from each other.
COLOURS = [(40 * (i % 3) + 20, 235 - 60 * (i // 5), 30 + 15 * i) for i in range(14)]


def draw_archive(folder: Path, people: int = 20, seed: int = 0) -> npt.NDArray[np.float64]:
    """Draw ``images/im00001.jpg``, … and write ``joints.mat``; returns what is in it, as (N, 14, 3).

    The second person has a joint that is not visible, the third one outside of the picture, the fourth none visible.
    """
    generator = np.random.default_rng(seed)
    (folder / 'images').mkdir(parents=True)
    joints = np.empty((people, 14, 3))
    for row in range(people):
        height, width = generator.integers(240, 480, 2)
        size = generator.uniform(0.3, 0.55, 2) * (width, height)
        corner = generator.uniform(0.2, 0.4, 2) * (width, height)
        joints[row, :, :2] = corner + _spread(generator) * size
        joints[row, :, 2] = 1
        if row == 1:
            joints[row, 4, 2] = 0
        if row == 2:
            joints[row, 5, :2] = (-30, 12)
        if row == 3:
            joints[row, :, 2] = 0
        picture = np.full((height, width, 3), 128, np.uint8)
        for (x, y, _), colour in zip(joints[row], COLOURS, strict=True):
            cv2.circle(picture, (round(x), round(y)), RADIUS, colour, -1)
        cv2.imwrite(str(folder / 'images' / f'im{row + 1:05d}.jpg'), picture, [cv2.IMWRITE_JPEG_QUALITY, 98])
    savemat(folder / 'joints.mat', {'joints': joints.transpose(1, 2, 0)})
    return joints


def _spread(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """(14, 2) in [0, 1], so that no disc covers another: a grid of 4 by 4, a little disturbed."""
    places = generator.permutation(16)[:14]
    grid = np.stack([places % 4, places // 4], 1) / 3
    return np.asarray(np.clip(grid + generator.uniform(-0.02, 0.02, grid.shape), 0, 1))
