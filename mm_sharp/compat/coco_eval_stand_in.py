"""``xtcocotools.cocoeval.COCOeval`` for keypoints, on top of faster-coco-eval (ours).

faster-coco-eval does the matching and the curves; what differs between the two is settled before it starts,
by handing it annotations in which the difference no longer shows:

- which people count: xtcocotools ignores those without a visible keypoint, counted from the keypoints
  (CrowdPose: from ``num_keypoints``); faster-coco-eval always trusts ``num_keypoints``, and would ignore
  every person where a file leaves it out;
- detections whose keypoint scores are all zero are dropped;
- an annotation may have the id 0, which faster-coco-eval takes for "unmatched": ids are counted from 1;
- ``use_area=False`` replaces areas by 0.53 times the box also where sizes are told apart;
- parts of COCO-WholeBody (``keypoints_face`` and so on) have keypoints and scores of their own.

Tested for equal numbers against xtcocotools in ``tests/compat/test_coco_stand_in.py``.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO as FasterCOCO  # noqa: N811
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from mmengine.logging import print_log

from .coco_params import PARTS, Params
from .coco_stand_in import COCO, Annotation

__all__ = ['COCOeval', 'Params']

# The standard deviations of COCO's 17 keypoints, as a fraction of the person's size.
_COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)  # fmt: skip
# The area of a person is about this part of the area of its box, where annotations have no area.
_AREA_OF_BOX = 0.53
# (precision or recall, IoU threshold or all, sizes), in the order of ``stats``.
_SUMMARY = (
    *(('precision', iou, 'all') for iou in (None, 0.5, 0.75)),
    *(('precision', None, size) for size in ('medium', 'large')),
    *(('recall', iou, 'all') for iou in (None, 0.5, 0.75)),
    *(('recall', None, size) for size in ('medium', 'large')),
)
_CROWD_SUMMARY = tuple(row for row in _SUMMARY if row[2] == 'all')
_CROWD_SPLIT = (0.2, 0.8)  # easy below the first crowd index, hard from the second on


class COCOeval:
    """Average precision and recall of keypoints.

    Args:
        cocoGt: annotations.
        cocoDt: detections, from ``cocoGt.loadRes``.
        iouType: one of the eight keypoint types that xtcocotools knows.
        sigmas: standard deviations per keypoint (K,), as a fraction of the person's size; COCO's by default.
        use_area: False where annotations have no area (CrowdPose, AI Challenger).

    Attributes:
        stats: after ``summarize``, the ten numbers AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl, or for
            ``keypoints_crowd`` the nine AP, AP50, AP75, AR, AR50, AR75, AP easy, AP medium, AP hard.
            Fractions in [0, 1], -1 where there is nothing to count.

    Raises:
        ValueError: an iouType that isn't about keypoints.
    """

    def __init__(
        self,
        cocoGt: COCO,  # noqa: N803
        cocoDt: COCO,  # noqa: N803
        iouType: str = 'keypoints',  # noqa: N803
        sigmas: Any = None,
        use_area: bool = True,
    ) -> None:
        self.params = Params(iouType)
        self.cocoGt, self.cocoDt = cocoGt, cocoDt
        self.params.imgIds = sorted(cocoGt.getImgIds())
        self.params.catIds = sorted(cocoGt.getCatIds())
        self.anno_file = cocoGt.anno_file
        self.sigmas = np.asarray(_COCO_SIGMAS if sigmas is None else sigmas, dtype=float)
        self.use_area = use_area
        self.eval: dict[str, Any] = {}
        self.stats: Any = []
        self._engine: COCOeval_faster | None = None

    def evaluate(self) -> None:
        """Match detections with annotations, image by image."""
        params = self.params
        if params.useSegm is not None or not params.useCats:
            raise ValueError(
                f'useSegm={params.useSegm!r} and useCats={params.useCats!r} must be None and 1: the '
                'stand-in for xtcocotools evaluates keypoints only'
            )
        params.imgIds = np.unique(np.asarray(params.imgIds)).tolist()
        params.catIds = np.unique(np.asarray(params.catIds)).tolist()
        params.maxDets = sorted(params.maxDets)
        self.eval = {}
        self._engine = self._build_engine()
        self._engine.evaluate()

    def accumulate(self) -> None:
        """Collect the matches into ``eval``: precision [T, R, K, A, M] and recall [T, K, A, M]."""
        if self._engine is None:
            raise RuntimeError('call evaluate() before accumulate()')
        self._engine.accumulate()
        self.eval = dict(self._engine.eval)

    def summarize(self) -> None:
        """Log the summary and keep it in ``stats``."""
        if not self.eval:
            raise RuntimeError('call evaluate() and accumulate() before summarize()')
        crowd = self.params.iouType == 'keypoints_crowd'
        rows = _CROWD_SUMMARY if crowd else _SUMMARY
        stats = [self._mean(*row) for row in rows]
        lines = [
            f' Average {kind.capitalize():<9} @[ OKS={"0.50:0.95" if iou is None else iou:<9} | area={size:>6} ]'
            f' = {value:.3f}'
            for (kind, iou, size), value in zip(rows, stats, strict=True)
        ]
        if crowd:
            stats += (by_crowd := self._precision_by_crowd())
            lines += [
                f' Average Precision @[ OKS=0.50:0.95 | crowd={name:>6} ] = {value:.3f}'
                for name, value in zip(('easy', 'medium', 'hard'), by_crowd, strict=True)
            ]
        print_log('\n'.join(['', *lines]), logger='current')
        self.stats = np.array(stats)

    def _mean(self, kind: str, iou: float | None, size: str) -> float:
        """The mean over thresholds, recalls and categories of those entries that exist; -1 if none do."""
        values = self.eval[kind]
        if iou is not None:
            values = values[np.asarray(self.params.iouThrs) == iou]
        sizes = [i for i, label in enumerate(self.params.areaRngLbl) if label == size]
        counts = [i for i, count in enumerate(self.params.maxDets) if count == 20]
        values = values[..., sizes, :][..., counts]
        values = values[values > -1]
        return float(np.mean(values)) if values.size else -1.0

    def _precision_by_crowd(self) -> list[float]:
        """AP of easy, medium and hard images (CrowdPose), by the crowd index in the annotation file.

        Settings without a person count as -1 and the result is rounded to four digits, as the
        benchmark's own code does it.
        """
        with open(self.anno_file[0], encoding='utf-8') as file:
            images = json.load(file)['images']
        low, high = _CROWD_SPLIT
        groups: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for image in images:
            groups[(image['crowdIndex'] >= low) + (image['crowdIndex'] >= high)].append(image['id'])
        return [round(self._precision_on(group), 4) for group in groups]

    def _precision_on(self, image_ids: list[Any]) -> float:
        if not image_ids:
            return -1.0
        part = COCOeval(self.cocoGt, self.cocoDt, self.params.iouType, self.sigmas, self.use_area)
        part.params.imgIds, part.params.catIds = image_ids, self.params.catIds
        part.evaluate()
        part.accumulate()
        return float(np.mean(part.eval['precision'][:, :, :, 0, :]))

    def _build_engine(self) -> COCOeval_faster:
        """faster-coco-eval on annotations that mean the same to it as to xtcocotools."""
        params = self.params
        numbers = {image: number for number, image in enumerate(params.imgIds, start=1)}
        people = _select(self.cocoGt, params) if numbers else []
        found = _select(self.cocoDt, params) if numbers else []
        truth = [self._person(a) for a in people]
        detections = [d for d in self._detections(found) if np.any(np.array(d['keypoints'][2::3]) > 0)]
        engine = COCOeval_faster(
            _dataset(truth, numbers, params.catIds),
            _dataset(detections, numbers, params.catIds),
            iouType='keypoints',
            kpt_oks_sigmas=self.sigmas,
            use_area=True,  # areas are settled in _person
        )
        inner = engine.params
        inner.imgIds, inner.catIds = list(numbers.values()), list(params.catIds)
        inner.iouThrs, inner.recThrs = np.asarray(params.iouThrs), np.asarray(params.recThrs)
        inner.maxDets = list(params.maxDets)
        inner.areaRng, inner.areaRngLbl = params.areaRng, params.areaRngLbl
        return engine

    def _person(self, annotation: Annotation) -> Annotation:
        parts, _ = PARTS[self.params.iouType]
        keypoints = [value for part in parts for value in annotation[part]]
        if self.params.iouType == 'keypoints_crowd':
            visible = annotation['num_keypoints']  # in CrowdPose: with visibility 2 only
        else:
            visible = int(np.count_nonzero(np.array(keypoints[2::3]) > 0))
        if self.use_area and 'area' not in annotation:
            raise ValueError(
                f'annotation {annotation["id"]} has no area, which use_area=True needs: set use_area=False '
                'in the metric, e.g. val_evaluator = dict(type="CocoMetric", use_area=False, ...)'
            )
        _, _, width, height = annotation['bbox']
        return {
            'image_id': annotation['image_id'],
            'category_id': annotation['category_id'],
            'bbox': annotation['bbox'],
            'area': annotation['area'] if self.use_area else width * height * _AREA_OF_BOX,
            'iscrowd': int(annotation['iscrowd']),
            'num_keypoints': visible,
            'keypoints': keypoints,
        }

    def _detections(self, found: list[Annotation]) -> list[Annotation]:
        parts, score = PARTS[self.params.iouType]
        if any(score not in detection for detection in found):
            warnings.warn(f"{score!r} not found, use 'score' instead.", stacklevel=4)
        return [
            {
                'image_id': d['image_id'],
                'category_id': d['category_id'],
                'bbox': d['bbox'],
                'area': d['area'],
                'score': d.get(score, d['score']),
                'keypoints': [value for part in parts for value in d[part]],
            }
            for d in found
        ]


def _select(coco: COCO, params: Params) -> list[Annotation]:
    found: list[Annotation] = coco.loadAnns(coco.getAnnIds(imgIds=params.imgIds, catIds=params.catIds))
    return found


def _dataset(annotations: list[Annotation], numbers: dict[Any, int], categories: list[Any]) -> FasterCOCO:
    """A faster-coco-eval data set with ids counted from 1."""
    for number, annotation in enumerate(annotations, start=1):
        annotation['id'] = number
        annotation['image_id'] = numbers[annotation['image_id']]
    return FasterCOCO(
        {
            'images': [{'id': number} for number in numbers.values()],
            'annotations': annotations,
            'categories': [{'id': category} for category in categories],
        }
    )
