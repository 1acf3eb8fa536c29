"""``xtcocotools.coco.COCO`` on top of faster-coco-eval (ours).

Only where xtcocotools is missing or broken: see ``xtcocotools_names``. faster-coco-eval's ``COCO`` has the
same methods; what MMPose can notice and it does otherwise is put right here: constructor and result
arguments, ``iscrowd`` filled in, annotations in the order of the images asked for, an area range that
includes its lower end, and no conversion of ids.
"""

from __future__ import annotations

import copy
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO as FasterCOCO  # noqa: N811

Annotation = dict[str, Any]


class COCO(FasterCOCO):  # type: ignore[misc]
    """A COCO annotation file: images, categories and annotations by id.

    Args:
        annotation_file: path of the JSON file. None: an empty object, to be filled by hand.
        test_index: keep only these keypoints of every annotation.
        ann_data: the content of the file, where it has been read already.

    Raises:
        ValueError: the file holds no JSON object.
    """

    def __init__(
        self,
        annotation_file: str | os.PathLike[str] | None = None,
        test_index: Sequence[int] | None = None,
        ann_data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.anno_file: list[Any] = [annotation_file]
        self.test_index = test_index
        if annotation_file is not None:
            data = _read(annotation_file) if ann_data is None else ann_data
            if not isinstance(data, dict):
                raise ValueError(
                    f'annotation_file={annotation_file!s} must hold a JSON object with images and '
                    f'annotations, got a {type(data).__name__}'
                )
            self.dataset = data
            self.createIndex()
        for annotation in self.dataset.get('annotations', []):
            if test_index is not None:
                points = np.reshape(annotation['keypoints'], (-1, 3))[list(test_index)]
                annotation['keypoints'] = points.reshape(-1).tolist()
            annotation.setdefault('iscrowd', False)

    def createIndex(self) -> None:  # noqa: N802
        """Fill ``anns``, ``imgs``, ``cats`` (by id), ``imgToAnns`` and ``catToImgs``."""
        annotations = self.dataset.get('annotations', [])
        self.imgs = {image['id']: image for image in self.dataset.get('images', [])}
        self.cats = {category['id']: category for category in self.dataset.get('categories', [])}
        self.anns = {annotation['id']: annotation for annotation in annotations}
        self.imgToAnns, self.catToImgs = defaultdict(list), defaultdict(list)
        for annotation in annotations:
            self.imgToAnns[annotation['image_id']].append(annotation)
            if self.cats:
                self.catToImgs[annotation['category_id']].append(annotation['image_id'])

    def getAnnIds(  # noqa: N802
        self,
        imgIds: Any = (),  # noqa: N803
        catIds: Any = (),  # noqa: N803
        areaRng: Sequence[float] = (),  # noqa: N803
        iscrowd: bool | None = None,
    ) -> list[int]:
        """Ids of the annotations of these images and categories; an empty argument filters nothing.

        Args:
            imgIds: one image id or several; annotations come in this order.
            catIds: one category id or several.
            areaRng: (low, high), low included, in square pixels.
            iscrowd: only crowd regions (True) or only others (False).
        """
        images, categories = _as_list(imgIds), set(_as_list(catIds))
        found: list[Annotation] = (
            [a for image in images if image in self.imgToAnns for a in self.imgToAnns[image]]
            if images
            else self.dataset['annotations']
        )
        if categories:
            found = [a for a in found if a['category_id'] in categories]
        if len(areaRng):
            found = [a for a in found if areaRng[0] <= a['area'] < areaRng[1]]
        if iscrowd is not None:
            found = [a for a in found if bool(a['iscrowd']) == bool(iscrowd)]
        return [a['id'] for a in found]

    def loadRes(self, resFile: Any, resData: list[Annotation] | None = None) -> COCO:  # noqa: N802, N803
        """Detections as a ``COCO`` object on the same images.

        Args:
            resFile: path of a JSON list of detections, or the list itself.
            resData: the content of the file, where it has been read already.

        Returns:
            An object whose annotations have ids from 1 on, boxes (x, y, w, h) and areas: those of the box
            where the detections have one, else those of the box around the keypoints.

        Raises:
            ValueError: not a list, an image that this object doesn't have, or neither box nor keypoints.
        """
        if len(self.anno_file) == 1:
            self.anno_file.append(resFile)
        is_path = isinstance(resFile, (str, os.PathLike))
        found = (_read(resFile) if resData is None else resData) if is_path else resFile
        if not isinstance(found, list):
            raise ValueError(f'resFile must hold a list of detections, got a {type(found).__name__}')
        strangers = {a['image_id'] for a in found} - self.imgs.keys()
        if strangers:
            raise ValueError(f'resFile has detections in images that are not annotated: {sorted(strangers)}')
        results = type(self)()
        results.dataset = {
            'images': list(self.dataset['images']),
            'annotations': found,
            'categories': copy.deepcopy(self.dataset.get('categories', [])),
        }
        with_box = bool(found) and bool(found[0].get('bbox'))
        for number, detection in enumerate(found, start=1):
            detection['id'] = number
            _complete(detection, with_box)
        results.createIndex()
        return results


def _complete(detection: Annotation, with_box: bool) -> None:
    """Give a detection its box (x, y, w, h) and its area in square pixels."""
    if with_box:
        _, _, width, height = detection['bbox']
        detection['area'] = width * height
        detection['iscrowd'] = 0
    elif 'keypoints' in detection:
        x, y = detection['keypoints'][0::3], detection['keypoints'][1::3]
        width, height = max(x) - min(x), max(y) - min(y)
        detection['area'] = width * height
        detection['bbox'] = [min(x), min(y), width, height]
    else:
        raise ValueError(
            f'a detection needs bbox or keypoints, got the keys {sorted(detection)}. For masks, use '
            'pycocotools or faster_coco_eval directly'
        )


def _as_list(ids: Any) -> list[Any]:
    return list(ids) if hasattr(ids, '__len__') and not isinstance(ids, str) else [ids]


def _read(path: str | os.PathLike[str]) -> Any:
    with open(path, encoding='utf-8') as file:
        return json.load(file)
