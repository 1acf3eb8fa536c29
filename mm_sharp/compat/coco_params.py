"""What ``coco_eval_stand_in`` evaluates: ``xtcocotools.cocoeval.Params`` for keypoints (ours)."""

from __future__ import annotations

from typing import Any

import numpy as np

# Which entries of an annotation make up the keypoints, and which entry of a detection is its score.
PARTS = {
    'keypoints': (('keypoints',), 'score'),
    'keypoints_body': (('keypoints',), 'score'),
    'keypoints_crowd': (('keypoints',), 'score'),
    'keypoints_foot': (('foot_kpts',), 'foot_score'),
    'keypoints_face': (('face_kpts',), 'face_score'),
    'keypoints_lefthand': (('lefthand_kpts',), 'lefthand_score'),
    'keypoints_righthand': (('righthand_kpts',), 'righthand_score'),
    'keypoints_wholebody': (
        ('keypoints', 'foot_kpts', 'face_kpts', 'lefthand_kpts', 'righthand_kpts'),
        'wholebody_score',
    ),
}


class Params:
    """What is evaluated, with the attribute names of COCO's own tools.

    Attributes:
        imgIds, catIds: ids of images and categories.
        iouThrs: thresholds of the object keypoint similarity.
        recThrs: recalls at which precision is read.
        maxDets: detections per image that count.
        areaRng, areaRngLbl: ranges of areas in square pixels, and their names.
        useCats, useSegm, iouType: as in xtcocotools; only keypoints, by category, are supported.
    """

    def __init__(self, iouType: str = 'keypoints') -> None:  # noqa: N803
        if iouType not in PARTS:
            raise ValueError(
                f'iouType={iouType!r} must be one of {sorted(PARTS)}. Boxes and masks are not evaluated '
                'by the stand-in for xtcocotools: use pycocotools or faster_coco_eval directly'
            )
        self.iouType = iouType
        self.imgIds: list[Any] = []
        self.catIds: list[Any] = []
        self.iouThrs = np.linspace(0.5, 0.95, 10)
        self.recThrs = np.linspace(0.0, 1.0, 101)
        self.maxDets = [20]
        self.areaRng = [[0, 1e5**2], [32**2, 96**2], [96**2, 1e5**2]]
        self.areaRngLbl = ['all', 'medium', 'large']
        self.useCats = 1
        self.useSegm = None
