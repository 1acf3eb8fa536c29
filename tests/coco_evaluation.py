"""MMPose's CocoMetric on the real people of the shared folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def coco_description() -> dict[str, Any]:
    from mmpose.datasets.datasets.utils import parse_pose_metainfo

    folder = Path(importlib.import_module('mmpose').__file__ or '').parent / '.mim' / 'configs'
    description: dict[str, Any] = parse_pose_metainfo({'from_file': str(folder / '_base_' / 'datasets' / 'coco.py')})
    return description


def evaluate_coco(folder: Path) -> dict[str, float]:
    """``CocoMetric`` on slightly wrong predictions for the annotated people of ``folder``."""
    from mmpose.evaluation.metrics import CocoMetric

    path = folder / 'coco' / 'test_coco.json'
    metric = CocoMetric(ann_file=str(path))
    metric.dataset_meta = coco_description()
    rng = np.random.default_rng(0)
    for person in json.loads(path.read_text())['annotations']:
        points = np.reshape(person['keypoints'], (1, -1, 3)).astype(float)
        x, y, w, h = person['bbox']
        instances = {
            'keypoints': points[..., :2] + rng.normal(0, 0.03 * w, points[..., :2].shape),
            'keypoint_scores': (points[..., 2] > 0).astype(float),
            'bboxes': np.array([[x, y, x + w, y + h]]),
            'bbox_scores': np.ones(1),
        }
        sample = {
            'id': person['id'],
            'img_id': person['image_id'],
            'category_id': 1,
            'gt_instances': {'bbox_scales': np.array([[w, h]]), 'bbox_scores': np.ones(1), 'bboxes': np.ones((1, 4))},
            'pred_instances': instances,
        }
        metric.process([], [sample])
    results: dict[str, float] = metric.evaluate(size=len(metric.results))
    return results
