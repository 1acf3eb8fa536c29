"""``xtcocotools.coco`` and ``xtcocotools.cocoeval`` for keypoints, by faster-coco-eval; when: ``mmpose_imports``.

What it does otherwise than xtcocotools is settled by the annotations that it gets: people without a visible keypoint
(CrowdPose: by ``num_keypoints``) and detections whose keypoint scores are all zero don't count; ids begin at 1, since 0
means "unmatched"; ``use_area=False`` replaces areas by 0.53 times the box also where sizes are told apart; parts of
COCO-WholeBody have keypoints and scores of their own.
"""

# ruff: noqa: N802, N803, N811, N815  (the names of the COCO tools)
from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO as FasterCOCO
from faster_coco_eval.core.cocoeval import Params as FasterParams
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from mmengine.logging import print_log

Annotation = dict[str, Any]

_WHOLEBODY = ('keypoints', 'foot_kpts', 'face_kpts', 'lefthand_kpts', 'righthand_kpts')
# Which entries of an annotation make up the keypoints, and which entry of a detection is its score.
_PARTS = {
    **{f'keypoints{part}': (('keypoints',), 'score') for part in ('', '_body', '_crowd')},
    **{f'keypoints_{part}': ((f'{part}_kpts',), f'{part}_score') for part in ('foot', 'face', 'lefthand', 'righthand')},
    'keypoints_wholebody': (_WHOLEBODY, 'wholebody_score'),
}
_AREA_OF_BOX = 0.53  # of its person, about, where annotations have none


class COCO(FasterCOCO):  # type: ignore[misc]
    """A COCO annotation file, or its content ``ann_data``; with ``test_index``, of these keypoints alone."""

    def __init__(self, annotation_file: Any = None, test_index: Any = None, ann_data: Any = None) -> None:
        super().__init__(annotation_file if ann_data is None else ann_data)
        self.anno_file: list[Any] = [annotation_file]
        self.test_index = test_index
        for annotation in self.dataset.get('annotations', []):
            if test_index is not None:
                points = np.reshape(annotation['keypoints'], (-1, 3))[list(test_index)]
                annotation['keypoints'] = points.reshape(-1).tolist()
            annotation.setdefault('iscrowd', False)

    def createIndex(self) -> None:
        """Fill ``anns``, ``imgs``, ``cats`` (by id), ``imgToAnns`` and ``catToImgs``."""
        with warnings.catch_warnings():
            # Such an annotation would count as unmatched: ``COCOeval`` counts from 1.
            warnings.filterwarnings('ignore', 'Found annotation id 0')
            super().createIndex()


class Params(FasterParams):  # type: ignore[misc]
    """What is evaluated, with the attribute names of COCO's own tools; only keypoints, by category, are supported."""

    useSegm = None  # MMPose sets it

    def __init__(self, iouType: str = 'keypoints') -> None:
        if iouType not in _PARTS:
            raise ValueError(
                f'iouType={iouType!r} must be one of {sorted(_PARTS)}. Boxes and masks are not evaluated '
                'by the stand-in for xtcocotools: use pycocotools or faster_coco_eval directly'
            )
        super().__init__(iouType)


class COCOeval:
    """Average precision and recall of keypoints.

    ``cocoDt`` is from ``cocoGt.loadRes``; ``sigmas`` (K,) are the keypoints' standard deviations as a fraction of the
    person's size; ``use_area=False`` is for annotations without an area. After ``summarize``, ``stats`` holds AP, AP50,
    AP75, APm, APl, AR, AR50, AR75, ARm, ARl, or for ``keypoints_crowd`` AP, AP50, AP75, AR, AR50, AR75, AP easy, AP
    medium, AP hard: fractions in [0, 1], -1 where there is nothing to count.
    """

    def __init__(
        self, cocoGt: COCO, cocoDt: COCO, iouType: str = 'keypoints', sigmas: Any = None, use_area: bool = True
    ) -> None:
        self.params = Params(iouType)
        self.params.imgIds, self.params.catIds = cocoGt.getImgIds(), sorted(cocoGt.getCatIds())
        if sigmas is not None:
            self.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=float)
        self.cocoGt, self.cocoDt, self.use_area = cocoGt, cocoDt, use_area
        self.eval: dict[str, Any] = {}
        self.stats: Any = []
        self._engine: Any = None

    def evaluate(self) -> None:
        """Match detections with annotations, image by image."""
        params = copy.copy(self.params)
        numbers = {image: number for number, image in enumerate(sorted(set(params.imgIds)), start=1)}
        truth = [self._person(a) for a in self._select(self.cocoGt, numbers)]
        detections = self._detections(self._select(self.cocoDt, numbers))
        sides = (_dataset(annotations, numbers, params.catIds) for annotations in (truth, detections))
        params.iouType, params.imgIds = 'keypoints', list(numbers.values())
        self._engine = COCOeval_faster(*sides, iouType='keypoints')
        self._engine.params = params
        self._engine.evaluate()

    def accumulate(self) -> None:
        """Collect the matches into ``eval``: precision [T, R, K, A, M] and recall [T, K, A, M]."""
        self._engine.accumulate()
        self.eval = dict(self._engine.eval)

    def summarize(self) -> None:
        """Log the summary and keep it in ``stats``."""
        lines: list[str] = []
        self._engine.print_function = lines.append
        self._engine.summarize()
        self.stats = np.array(self._engine.stats)
        if self.params.iouType == 'keypoints_crowd':  # sizes are not told apart
            by_crowd = self._precision_by_crowd()
            self.stats = np.array([*self.stats[[0, 1, 2, 5, 6, 7]], *by_crowd])
            lines.append(' AP easy {:.3f}, medium {:.3f}, hard {:.3f}'.format(*by_crowd))
        print_log('\n'.join(['', *lines]), logger='current')

    def _precision_by_crowd(self) -> list[float]:
        """AP of easy, medium and hard images (CrowdPose), rounded and with -1 for nobody, as the benchmark has it."""
        with open(self.cocoGt.anno_file[0], encoding='utf-8') as file:
            crowded = {image['id']: image['crowdIndex'] for image in json.load(file)['images']}
        limits = (-np.inf, 0.2), (0.2, 0.8), (0.8, np.inf)
        groups = ([image for image, index in crowded.items() if low <= index < high] for low, high in limits)
        return [round(self._precision_on(group), 4) for group in groups]

    def _precision_on(self, images: list[Any]) -> float:
        if not images:
            return -1.0
        part = copy.copy(self)
        part.params = copy.copy(self.params)
        part.params.imgIds = images
        part.evaluate()
        part.accumulate()
        return float(np.mean(part.eval['precision'][:, :, :, 0, :]))

    def _select(self, coco: COCO, images: dict[Any, int]) -> list[Annotation]:
        found = coco.loadAnns(coco.getAnnIds(imgIds=list(images), catIds=self.params.catIds)) if images else []
        parts, _ = _PARTS[self.params.iouType]
        return [
            {**a, 'image_id': images[a['image_id']], 'keypoints': [value for part in parts for value in a[part]]}
            for a in found
        ]

    def _person(self, annotation: Annotation) -> Annotation:
        person = dict(annotation)
        if self.params.iouType != 'keypoints_crowd':  # CrowdPose counts those with visibility 2 only
            person['num_keypoints'] = int(np.count_nonzero(np.array(person['keypoints'][2::3]) > 0))
        if not self.use_area:
            person['area'] = person['bbox'][2] * person['bbox'][3] * _AREA_OF_BOX
        return person

    def _detections(self, found: list[Annotation]) -> list[Annotation]:
        _, score = _PARTS[self.params.iouType]
        if any(score not in detection for detection in found):
            warnings.warn(f"{score!r} not found, use 'score' instead.", stacklevel=3)
        return [{**d, 'score': d.get(score, d['score'])} for d in found if np.any(np.array(d['keypoints'][2::3]) > 0)]


def _dataset(annotations: list[Annotation], images: dict[Any, int], categories: list[Any]) -> FasterCOCO:
    """A faster-coco-eval data set with ids counted from 1."""
    people = [{**annotation, 'id': number} for number, annotation in enumerate(annotations, start=1)]
    listed = {'images': images.values(), 'categories': categories}
    return FasterCOCO({'annotations': people, **{key: [{'id': i} for i in ids] for key, ids in listed.items()}})
