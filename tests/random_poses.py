"""Random people and detections in COCO's formats, with everything that an evaluation has to get right."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

# Keypoints of the parts of COCO-WholeBody besides the body's 17.
PARTS = {'foot': 6, 'face': 68, 'lefthand': 21, 'righthand': 21}


def _keypoints(rng: np.random.Generator, count: int, box: list[float]) -> list[float]:
    points = np.zeros((count, 3))
    points[:, 0] = box[0] + rng.random(count) * box[2]
    points[:, 1] = box[1] + rng.random(count) * box[3]
    points[:, 2] = rng.choice([0, 1, 2], count, p=[0.3, 0.2, 0.5])
    points[points[:, 2] == 0] = 0
    return [round(float(value), 2) for value in points.reshape(-1)]


def make_truth(
    seed: int, images: int = 12, categories: int = 1, whole_body: bool = False, first_id: int = 0
) -> dict[str, Any]:
    """Annotated people of all sizes: crowd regions, people without visible keypoints, empty images."""
    rng = np.random.default_rng(seed)
    people = []
    for image in range(images):
        for _ in range(int(rng.integers(0, 7))):
            size = float(np.exp(rng.uniform(np.log(15), np.log(400))))
            box = [*rng.uniform(0, 300, 2).round(1).tolist(), round(size, 1), round(size * 1.6, 1)]
            keypoints = _keypoints(rng, 17, box)
            if rng.random() < 0.15:
                keypoints = [0.0] * 51
            person = {
                'id': first_id + len(people),
                'image_id': 100 + 7 * image,
                'category_id': int(rng.integers(1, categories + 1)),
                'bbox': box,
                'area': round(box[2] * box[3] * float(rng.uniform(0.3, 0.9)), 2),
                'iscrowd': int(rng.random() < 0.1),
                'keypoints': keypoints,
                'num_keypoints': sum(v > 0 for v in keypoints[2::3]),
            }
            if whole_body:
                for part, count in PARTS.items():
                    person[f'{part}_kpts'] = _keypoints(rng, count, box)
            people.append(person)
    return {
        'images': [
            {'id': 100 + 7 * i, 'height': 700, 'width': 700, 'crowdIndex': float(rng.random())} for i in range(images)
        ],
        'annotations': people,
        'categories': [{'id': c, 'name': str(c), 'supercategory': 'x'} for c in range(1, categories + 1)],
    }


def make_detections(seed: int, truth: dict[str, Any], with_box: bool = False) -> list[dict[str, Any]]:
    """Noisy copies of the people (some twice, some not at all) and false alarms; many equal scores."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for person in truth['annotations']:
        for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
            noise = float(rng.choice([0.0, 0.02, 0.1, 0.3])) * person['bbox'][2]
            found.append(_detection(rng, person, noise, with_box))
    for person in truth['annotations'][::3]:
        stranger = copy.deepcopy(person)
        stranger['image_id'] = int(rng.choice([image['id'] for image in truth['images']]))
        found.append(_detection(rng, stranger, 200.0, with_box))
    return found


def _detection(rng: np.random.Generator, person: dict[str, Any], noise: float, with_box: bool) -> dict[str, Any]:
    detection = {key: person[key] for key in ('image_id', 'category_id')}
    for key in ('keypoints', *(f'{part}_kpts' for part in PARTS)):
        if key in person:
            points = np.reshape(person[key], (-1, 3)).astype(float)
            points[:, :2] += rng.normal(0, 1, (len(points), 2)) * noise
            points[:, 2] = 0 if rng.random() < 0.05 else rng.random(len(points)).round(1)
            detection[key] = points.reshape(-1).round(2).tolist()
    detection['score'] = round(float(rng.random()), 1)
    if with_box:
        detection['bbox'] = person['bbox']
    return detection
