"""A data set of a few pictures, drawn in a second, laid out as tools/make_demo_data.py lays out its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# A demo recipe with a narrow ResNet, of ``width`` channels in its first stage, on the people that draw_coco() draws.
NARROW_RECIPE = """
_base_ = '{base}'
model = dict(backbone=dict(stem_channels={width}, base_channels={width}), head=dict(in_channels=8 * {width}))
train_cfg = dict(max_epochs=1, val_interval=1)
places = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}'))
train_dataloader = val_dataloader = test_dataloader = places
val_evaluator = [
    dict(type='CocoMetric', ann_file='{data}/annotations/person_keypoints_val.json'),
    dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'),
]
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
"""

# Where COCO's 17 keypoints are on an upright figure, as fractions of its box.
_FIGURE = np.array([
    (0.50, 0.08), (0.54, 0.05), (0.46, 0.05), (0.58, 0.07), (0.42, 0.07), (0.70, 0.22), (0.30, 0.22), (0.80, 0.38),
    (0.20, 0.38), (0.85, 0.52), (0.15, 0.52), (0.62, 0.52), (0.38, 0.52), (0.64, 0.74), (0.36, 0.74), (0.66, 0.95),
    (0.34, 0.95),
])  # fmt: skip
_WIDTH, _HEIGHT = 96, 128


def draw_coco(folder: Path, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """Draw one coloured figure a picture and write COCO keypoint annotations.

    Args:
        folder: Where ``train/``, ``val/`` and ``annotations/`` are made.
        train: Training pictures.
        val: Validation pictures.
        seed: Of the generator.

    Returns:
        ``folder``.
    """
    rng = np.random.default_rng(seed)
    (folder / 'annotations').mkdir(parents=True)
    for split, count in (('train', train), ('val', val)):
        (folder / split).mkdir()
        people = [_draw(folder / split / f'{i:06d}.png', i, rng) for i in range(1, count + 1)]
        content = {
            'images': [
                {'id': p['image_id'], 'file_name': f'{p["image_id"]:06d}.png', 'width': _WIDTH, 'height': _HEIGHT}
                for p in people
            ],
            'annotations': people,
            'categories': [{'id': 1, 'name': 'person'}],
        }
        (folder / 'annotations' / f'person_keypoints_{split}.json').write_text(json.dumps(content))
    return folder


def draw_mpii(folder: Path, count: int = 4, seed: int = 0) -> Path:
    """Draw figures with annotations as MMPose reads MPII's: ``images/`` and ``annotations/mpii_train.json``."""
    rng = np.random.default_rng(seed)
    (folder / 'images').mkdir(parents=True)
    (folder / 'annotations').mkdir()
    people = []
    for i in range(count):
        person = _draw(folder / 'images' / f'{i:06d}.png', i, rng)
        x, y, width, height = person['bbox']
        people.append({
            'image': f'{i:06d}.png',
            'center': [x + width / 2, y + height / 2],
            'scale': height / 200,
            'joints': np.reshape(person['keypoints'], (17, 3))[:16, :2].tolist(),
            'joints_vis': [1] * 16,
        })  # fmt: skip
    (folder / 'annotations' / 'mpii_train.json').write_text(json.dumps(people))
    return folder


def _draw(file: Path, number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Draw one picture; returns its COCO annotation."""
    box = np.array([*rng.uniform(5, 25, 2), *rng.uniform((50, 85), (65, 100))])
    points = box[:2] + box[2:] * (_FIGURE + rng.normal(scale=0.02, size=_FIGURE.shape))
    image = np.full((_HEIGHT, _WIDTH, 3), rng.integers(0, 256, 3), dtype=np.uint8)
    for point in points:
        color = [int(c) for c in rng.integers(0, 256, 3)]
        cv2.circle(image, (round(point[0]), round(point[1])), 3, color, thickness=-1)
    cv2.imwrite(str(file), image)
    keypoints = np.column_stack([points, np.full(17, 2)])
    return {
        'id': number,
        'image_id': number,
        'category_id': 1,
        'bbox': box.tolist(),
        'area': float(box[2] * box[3]),
        'iscrowd': 0,
        'num_keypoints': 17,
        'keypoints': keypoints.ravel().tolist(),
    }


def write_float_and_w4a4(folder: Path, base: str, width: int) -> None:
    """Drawn people in ``people/``, and the configs ``float.py`` and ``w4a4.py`` of a narrow model on them."""
    data = draw_coco(folder / 'people')
    (folder / 'float.py').write_text(NARROW_RECIPE.format(base=base, data=data, width=width))
    (folder / 'w4a4.py').write_text("_base_ = ['float.py', 'mm_sharp::_base_/quantization/w4a4.py']\n")
