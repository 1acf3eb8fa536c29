"""The demo data as the stock readers and metrics of MMPose see it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat

import mm_sharp  # noqa: F401  (patches the stack before MMPose is imported)
from mm_sharp.demo import Person, draw_scene, make_dataset
from mm_sharp.demo.body import MPII_JOINTS
from mm_sharp.demo.dataset import coco_annotation, head_box, mat_file, mpii_record
from mm_sharp.demo.settings import HEIGHT, WIDTH

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


def mpii_dataset(folder: Path, split: str, **options: Any) -> Any:
    from mmpose.datasets import MpiiDataset

    return MpiiDataset(
        data_root=str(folder), ann_file=f'mpii/mpii_{split}.json', data_prefix={'img': f'{split}/'}, **options
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


def test_mpii_pck_gives_full_marks_to_the_truth(folder: Path, people: list[Person]) -> None:
    from mmpose.evaluation import MpiiPCKAccuracy

    dataset = mpii_dataset(folder, 'val', headbox_file=str(folder / 'mpii/mpii_gt_val.mat'), test_mode=True)
    assert len(dataset) == len(people)

    def score(shift: float) -> dict[str, float]:
        metric = MpiiPCKAccuracy(thr=0.5, norm_item='head')
        samples = []
        for number, person in enumerate(people):
            info = dataset.get_data_info(number)
            truth = {key: info[key] for key in ('keypoints', 'keypoints_visible', 'head_size')}
            drawn = np.array([[person.points[name] for name in MPII_JOINTS]]) + shift
            samples.append({'gt_instances': truth, 'pred_instances': {'keypoints': drawn}})
        metric.process([{}], samples)
        return dict(metric.evaluate(len(samples)))

    exact = score(0.0)
    assert exact['PCK'] == pytest.approx(100.0)
    assert exact['PCK@0.1'] == pytest.approx(100.0)
    assert score(40.0)['PCK'] < 20


def test_mpii_reader_ends_at_the_middle_of_the_box(folder: Path, people: list[Person]) -> None:
    dataset = mpii_dataset(folder, 'val')
    for number, person in enumerate(people):
        info = dataset.get_data_info(number)
        left, top, width, height = person.box
        np.testing.assert_allclose(info['bbox_center'][0], (left + width / 2, top + height / 2), atol=1e-3)
        np.testing.assert_allclose(info['bbox_scale'][0], max(width, height), rtol=1e-5)
        assert Path(info['img_path']).is_file()


def test_mpii_joints_count_from_one_and_missing_ones_are_marked(people: list[Person]) -> None:
    outside = 0
    for person in people:
        record = mpii_record(person, '000001.png')
        for name, joint, seen in zip(MPII_JOINTS, record['joints'], record['joints_vis'], strict=True):
            u, v = person.points[name]
            if 0 <= u <= WIDTH - 1 and 0 <= v <= HEIGHT - 1:
                assert (joint, seen) == (pytest.approx([u + 1, v + 1]), 1)
            else:
                assert (joint, seen) == ([-1.0, -1.0], 0)
                outside += 1
    assert outside > 0, 'none of the people leaves the image: the case is not tested'


def test_ground_truth_file_has_the_layout_of_mpii(folder: Path, people: list[Person]) -> None:
    records = json.loads((folder / 'mpii/mpii_val.json').read_text())
    assert records == [
        mpii_record(person, f'{index + 1:06d}.png')
        for index in range(VAL)
        for person in draw_scene(0, 'val', index).people
    ]
    content = loadmat(folder / 'mpii/mpii_gt_val.mat')
    count = len(people)
    assert content['headboxes_src'].shape == (2, 2, count)
    assert content['jnt_missing'].shape == (16, count)
    assert content['pos_gt_src'].shape == (16, 2, count)
    assert [str(name[0]) for name in content['dataset_joints'].ravel()] == list(MPII_JOINTS)
    for number, person in enumerate(people):
        left, top, right, bottom = head_box(person)
        np.testing.assert_array_equal(content['headboxes_src'][..., number], [[left, top], [right, bottom]])
        assert 5 < np.hypot(right - left, bottom - top) < HEIGHT / 2


def test_ground_truth_file_has_no_clock_in_it(people: list[Person]) -> None:
    records, heads = [mpii_record(p, '000001.png') for p in people], [head_box(p) for p in people]
    content = mat_file(records, heads)
    assert content[:116] == b'MATLAB 5.0 MAT-file, mm_sharp demo people'.ljust(116)
    assert loadmat(io.BytesIO(content))['headboxes_src'].shape[2] == len(people)


def test_annotation_ids_follow_from_the_image(people: list[Person]) -> None:
    ids = {coco_annotation(people[0], image, number)['id'] for image in (1, 2, 3) for number in (0, 1)}
    assert ids == {10, 11, 20, 21, 30, 31}
