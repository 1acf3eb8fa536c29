"""The demo data as the stock readers and metrics of MMPose see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mm_sharp  # noqa: F401  (patches the stack before MMPose is imported)
from mm_sharp.demo import Person, draw_scene, make_dataset
from mm_sharp.demo.dataset import coco_annotation

TRAIN, VAL = 2, 12

# MMPose's datasets name their metainfo by a path in its repository, and warn when they find it elsewhere.
pytestmark = pytest.mark.filterwarnings('ignore:The metainfo config file:UserWarning')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('demo')
    assert make_dataset(out, TRAIN, VAL, workers=0, progress=False)
    return out


@pytest.fixture(scope='module')
def people() -> list[Person]:
    """All people of the validation images, in order."""
    return [person for index in range(VAL) for person in draw_scene(0, 'val', index).people]


def coco_dataset(folder: Path, split: str, **options: Any) -> Any:
    from mmpose.datasets import CocoDataset

    return CocoDataset(
        data_root=str(folder),
        ann_file=f'annotations/person_keypoints_{split}.json',
        data_prefix={'img': f'{split}/'},
        **options,
    )


def test_coco_api_reads_the_annotations(folder: Path, people: list[Person]) -> None:
    from xtcocotools.coco import COCO

    coco = COCO(str(folder / 'annotations/person_keypoints_val.json'))
    assert sorted(coco.getImgIds()) == list(range(1, VAL + 1))
    annotations = coco.loadAnns(sorted(coco.getAnnIds()))
    assert [a['area'] for a in annotations] == [person.area for person in people]
    assert all(a['id'] > 0 and a['iscrowd'] == 0 and a['category_id'] == 1 for a in annotations)
    (category,) = coco.loadCats(coco.getCatIds())
    assert category['keypoints'][5] == 'left_shoulder'
    assert [6, 8] in category['skeleton']  # from the left shoulder to the left elbow, counted from 1


def test_category_is_that_of_mmpose(folder: Path) -> None:
    content = json.loads((folder / 'annotations/person_keypoints_train.json').read_text())
    (category,) = content['categories']
    dataset = coco_dataset(folder, 'train', lazy_init=True)
    meta = dataset.metainfo
    assert category['keypoints'] == [meta['keypoint_id2name'][i] for i in range(17)]
    assert {frozenset(link) for link in category['skeleton']} == {
        frozenset((a + 1, b + 1)) for a, b in meta['skeleton_links']
    }


def test_stock_coco_dataset_loads_pictures_and_people(folder: Path) -> None:
    from mmpose.datasets.transforms import GetBBoxCenterScale, LoadImage, PackPoseInputs, TopdownAffine

    pipeline = [LoadImage(), GetBBoxCenterScale(), TopdownAffine(input_size=(96, 128)), PackPoseInputs()]
    dataset = coco_dataset(folder, 'train', pipeline=pipeline)
    expected = [(i, person) for i in range(TRAIN) for person in draw_scene(0, 'train', i).people]
    assert len(dataset) == len(expected)
    for number, (index, person) in enumerate(expected):
        info, packed = dataset.get_data_info(number), dataset[number]
        flags = np.array([k[2] for k in person.keypoints])
        np.testing.assert_array_equal(info['keypoints_visible'][0], flags > 0)
        np.testing.assert_allclose(info['keypoints'][0], [k[:2] for k in person.keypoints], atol=1e-4)
        assert info['img_id'] == index + 1
        assert info['num_keypoints'] == (flags > 0).sum()
        assert packed['inputs'].shape == (3, 128, 96)


def test_coco_metric_gives_full_marks_to_the_truth(folder: Path) -> None:
    from mmpose.evaluation import CocoMetric

    dataset = coco_dataset(folder, 'val', test_mode=True)
    metric = CocoMetric(ann_file=str(folder / 'annotations/person_keypoints_val.json'))
    metric.dataset_meta = dataset.metainfo
    samples = []
    for number in range(len(dataset)):
        info = dataset.get_data_info(number)
        instances = {'keypoints': info['keypoints'], 'keypoint_scores': np.ones((1, 17))}
        truth = {'bbox_scores': info['bbox_score']}
        samples.append({'id': info['id'], 'img_id': info['img_id'], 'pred_instances': instances, 'gt_instances': truth})
    metric.process([{}], samples)
    result = metric.evaluate(len(samples))
    assert result['coco/AP'] == pytest.approx(1.0)
    assert result['coco/AR'] == pytest.approx(1.0)
    for sample in samples:  # a constant shift must cost something, or the test means nothing
        sample['pred_instances']['keypoints'] = sample['pred_instances']['keypoints'] + 15.0
    metric.process([{}], samples)
    assert metric.evaluate(len(samples))['coco/AP'] < 0.5


def test_annotation_ids_follow_from_the_image(people: list[Person]) -> None:
    ids = {coco_annotation(people[0], image, number)['id'] for image in (1, 2, 3) for number in (0, 1)}
    assert ids == {10, 11, 20, 21, 30, 31}
