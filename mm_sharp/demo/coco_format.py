"""People as COCO keypoint annotations (the layout of ``person_keypoints_*.json``).

Coordinates count from 0 at the centre of the top left pixel. The box is the body's outline inside the image,
with what other people and objects cover, so that it holds the hidden keypoints too; the area is the number of
pixels that show the person. The skeleton's numbers count keypoints from 1, as COCO's do.
"""

from __future__ import annotations

from typing import Any

from mm_sharp.demo.person import Person
from mm_sharp.demo.settings import HEIGHT, WIDTH
from mm_sharp.demo.skeleton import COCO_KEYPOINTS

#: Pairs of keypoints that are joined by a line.
_LINKS = (
    ('left_ankle', 'left_knee'), ('left_knee', 'left_hip'), ('right_ankle', 'right_knee'),
    ('right_knee', 'right_hip'), ('left_hip', 'right_hip'), ('left_shoulder', 'left_hip'),
    ('right_shoulder', 'right_hip'), ('left_shoulder', 'right_shoulder'), ('left_shoulder', 'left_elbow'),
    ('right_shoulder', 'right_elbow'), ('left_elbow', 'left_wrist'), ('right_elbow', 'right_wrist'),
    ('left_eye', 'right_eye'), ('nose', 'left_eye'), ('nose', 'right_eye'), ('left_eye', 'left_ear'),
    ('right_eye', 'right_ear'), ('left_ear', 'left_shoulder'), ('right_ear', 'right_shoulder'),
)  # fmt: skip

SKELETON = [[COCO_KEYPOINTS.index(a) + 1, COCO_KEYPOINTS.index(b) + 1] for a, b in _LINKS]

#: People per image that have an annotation id of their own.
_IDS_PER_IMAGE = 10


def coco_image(image_id: int) -> dict[str, Any]:
    """The entry of an image; its file is named after its id."""
    return {
        'id': image_id,
        'file_name': f'{image_id:06d}.png',
        'width': WIDTH,
        'height': HEIGHT,
    }


def coco_annotation(person: Person, image_id: int, number: int) -> dict[str, Any]:
    """The annotation of person ``number`` (from 0) in an image.

    Ids follow from the image alone and are never 0, which COCO's evaluation takes for "no match".
    """
    return {
        'id': image_id * _IDS_PER_IMAGE + number,
        'image_id': image_id,
        'category_id': 1,
        'iscrowd': 0,
        'bbox': list(person.box),
        'area': person.area,
        'num_keypoints': sum(flag > 0 for _, _, flag in person.keypoints),
        'keypoints': [value for keypoint in person.keypoints for value in keypoint],
    }


def coco_file(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``person_keypoints_*.json``."""
    category = {
        'id': 1,
        'name': 'person',
        'supercategory': 'person',
        'keypoints': list(COCO_KEYPOINTS),
        'skeleton': SKELETON,
    }
    return {
        'info': {'description': 'mm_sharp demo people', 'version': '1.0'},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [category],
    }
