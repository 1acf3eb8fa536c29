"""Keypoint annotations of which a share is wrong, as hasty annotators make them.

Half of the corrupted people have every labelled keypoint moved by a normal error, the others have left and right
exchanged. The file and the seed alone decide, so it is the same for every method, in every epoch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from mm_sharp.compat.atomic_writes import write_atomically
from mm_sharp.errors import UsageError, some

# A keypoint's error, in square roots of the box's area: a tenth of a person is about as wide as a head.
JITTER = 0.1


def corrupt_file(source: Path, target: Path, share: float, seed: int = 0) -> None:
    """Write a COCO file with a share of its labelled people corrupted; a UsageError if there are none, or no names."""
    content = json.loads(source.read_text())
    people = [entry for entry in content.get('annotations', []) if any(entry.get('keypoints', [])[2::3])]
    if not people:
        raise UsageError(f"'{source}' has no annotated keypoints to corrupt")
    names = content['categories'][0].get('keypoints') or []
    mirror = _mirror(names)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(people))[: round(share * len(people))]
    if len(chosen) and mirror == list(range(len(names))):
        named = f'call none of their keypoints left_… and right_… ({some(names)})' if names else 'name no keypoints'
        raise UsageError(f"'{source}': the annotations {named}, so left and right are not known")
    for number, row in enumerate(chosen):
        person = people[row]
        points = np.asarray(person['keypoints'], np.float64).reshape(-1, 3)
        if number % 2:
            scale = JITTER * math.sqrt(person['bbox'][2] * person['bbox'][3])
            errors = generator.normal(scale=scale, size=(len(points), 2))
            points[:, :2] += np.where(points[:, 2:] > 0, errors, 0.0)
            person['keypoints'] = [round(float(value), 2) for value in points.ravel()]
        else:
            person['keypoints'] = points[mirror].ravel().tolist()
    write_atomically(json.dumps(content).encode(), target)  # a half of it would be taken for the whole later


def _mirror(names: list[str]) -> list[int]:
    """For each keypoint, the place of the one on the other side; its own if there is none."""
    sides = {'left': 'right', 'right': 'left'}
    others = ['_'.join([sides.get(side, side), *rest]) for side, *rest in (name.split('_') for name in names)]
    return [names.index(other) if other in names else place for place, other in enumerate(others)]
