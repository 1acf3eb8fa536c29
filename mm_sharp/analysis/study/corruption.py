"""Keypoint annotations of which a share is wrong, as hasty annotators make them (ours).

Half of the corrupted people have every labelled keypoint moved by a normal error, the others have left and right
exchanged. Pictures, boxes and all other people stay as they are. What is corrupted depends on the file and the seed
alone, so it is the same for every method, and in every epoch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mm_sharp.errors import UsageError

# Of a keypoint's error, in square roots of the box's area: a tenth of a person is about as wide as a head.
JITTER = 0.1


def corrupt_file(source: Path, target: Path, share: float, seed: int = 0) -> list[int]:
    """Write a COCO keypoint file with a share of its people corrupted.

    Args:
        source: The annotations.
        target: The file to write; its folder is made.
        share: Of the people with labelled keypoints, in [0, 1]; their number is exact.
        seed: Of the draws.

    Returns:
        The ids of the corrupted annotations.

    Raises:
        UsageError: ``source`` has no annotated keypoints.
    """
    content = json.loads(source.read_text())
    people = [entry for entry in content.get('annotations', []) if any(entry.get('keypoints', [])[2::3])]
    if not people:
        raise UsageError(f"'{source}' has no annotated keypoints to spoil")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(people))[: round(share * len(people))]
    for number, row in enumerate(chosen):
        spoil = jittered if number % 2 else swapped
        people[row]['keypoints'] = spoil(people[row], content['categories'][0], generator)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content))
    return [int(people[row]['id']) for row in chosen]


def jittered(person: dict[str, Any], category: dict[str, Any], generator: np.random.Generator) -> list[float]:
    """A person's keypoints, the labelled ones moved by a normal error of :data:`JITTER`; flat (x, y, v)."""
    points = np.asarray(person['keypoints'], np.float64).reshape(-1, 3)
    errors = generator.normal(scale=JITTER * math.sqrt(person['bbox'][2] * person['bbox'][3]), size=(len(points), 2))
    points[:, :2] += np.where(points[:, 2:] > 0, errors, 0.0)
    return [round(float(value), 2) for value in points.ravel()]


def swapped(person: dict[str, Any], category: dict[str, Any], generator: np.random.Generator) -> list[float]:
    """A person's keypoints, those named ``left_…`` exchanged with those named ``right_…``; flat (x, y, v).

    Raises:
        UsageError: The category does not name the keypoints.
    """
    names = category.get('keypoints')
    if not names:
        raise UsageError('the annotations do not name their keypoints, so left and right are not known')
    other = [names.index(_mirrored(name)) if _mirrored(name) in names else i for i, name in enumerate(names)]
    points = np.asarray(person['keypoints'], np.float64).reshape(-1, 3)[other]
    return [float(value) for value in points.ravel()]


def _mirrored(name: str) -> str:
    for side, opposite in (('left_', 'right_'), ('right_', 'left_')):
        if name.startswith(side):
            return opposite + name.removeprefix(side)
    return name
