"""The stand-in for xtcocotools gives xtcocotools' numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mm_sharp  # noqa: F401  # the repairs of the stack, without which mmpose doesn't import here

pytest.importorskip('faster_coco_eval')

from mm_sharp.compat.coco_stand_in import COCO, COCOeval, Params
from tests.random_poses import PARTS, make_detections, make_truth

CROWD_TYPE = 'keypoints_crowd'


@pytest.fixture(scope='session')
def real() -> Any:
    """The real xtcocotools; there is none for Python 3.12."""
    pytest.importorskip('xtcocotools._mask', reason='the real xtcocotools is not installed', exc_type=ImportError)
    import xtcocotools.coco
    import xtcocotools.cocoeval

    return xtcocotools


def evaluate(api: Any, truth: dict[str, Any], found: list[dict[str, Any]], **kwargs: Any) -> np.ndarray:
    """The summary's numbers by ``api``, a pair (COCO, COCOeval)."""
    coco_class, eval_class = api
    path = kwargs.pop('path', None)
    coco = coco_class(str(path)) if path else coco_class('in memory', ann_data=copy.deepcopy(truth))
    evaluation = eval_class(coco, coco.loadRes(copy.deepcopy(found)), **kwargs)
    evaluation.params.useSegm = None
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.array(evaluation.stats, dtype=float)


def assert_equal(real: Any, truth: dict[str, Any], found: list[dict[str, Any]], **kwargs: Any) -> np.ndarray:
    expected = evaluate((real.coco.COCO, real.cocoeval.COCOeval), truth, found, **kwargs)
    got = evaluate((COCO, COCOeval), truth, found, **kwargs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    return got


@pytest.mark.parametrize('with_box', [False, True])
@pytest.mark.parametrize('seed', range(8))
def test_ten_numbers(real: Any, seed: int, with_box: bool) -> None:
    truth = make_truth(seed, images=30)
    stats = assert_equal(real, truth, make_detections(seed, truth, with_box), sigmas=None)
    assert stats.shape == (10,)
    assert 0 < stats[0] < 1, 'the data must be neither trivial nor hopeless'


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 8),
    categories=st.integers(1, 3),
    use_area=st.booleans(),
    first_id=st.sampled_from([0, 1, 1000]),
)
def test_ten_numbers_of_anything(
    real: Any, seed: int, images: int, categories: int, use_area: bool, first_id: int
) -> None:
    truth = make_truth(seed, images, categories, first_id=first_id)
    assert_equal(real, truth, make_detections(seed, truth), use_area=use_area)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('part', ['body', 'foot', 'face', 'lefthand', 'righthand', 'wholebody'])
def test_parts_of_the_whole_body(real: Any, part: str, seed: int) -> None:
    truth = make_truth(seed, whole_body=True)
    found = make_detections(seed, truth)
    if part != 'body':
        for detection in found:
            detection[f'{part}_score'] = 1 - detection['score']
    count = {'body': 17, 'wholebody': 133, **PARTS}[part]
    sigmas = np.random.default_rng(seed).uniform(0.02, 0.1, count)
    assert_equal(real, truth, found, iouType=f'keypoints_{part}', sigmas=sigmas)


@pytest.mark.filterwarnings("ignore:.*not found, use 'score' instead")
def test_part_without_its_own_score(real: Any) -> None:
    truth = make_truth(3, whole_body=True)
    found = make_detections(3, truth)
    assert_equal(real, truth, found, iouType='keypoints_face', sigmas=np.full(68, 0.05))
    with pytest.warns(UserWarning, match="'face_score' not found"):
        evaluate((COCO, COCOeval), truth, found, iouType='keypoints_face', sigmas=np.full(68, 0.05))


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # xtcocotools leaves it open
@pytest.mark.parametrize('seed', range(4))
def test_crowd_pose(real: Any, seed: int, tmp_path: Path) -> None:
    truth = make_truth(seed, images=30)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    stats = assert_equal(
        real,
        truth,
        make_detections(seed, truth),
        path=path,
        iouType=CROWD_TYPE,
        use_area=False,
        sigmas=np.full(17, 0.07),
    )
    assert stats.shape == (9,)


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_crowd_pose_without_hard_images(real: Any, tmp_path: Path) -> None:
    truth = make_truth(0)
    for image in truth['images']:
        image['crowdIndex'] = 0.1
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    stats = assert_equal(real, truth, make_detections(0, truth), path=path, iouType=CROWD_TYPE)
    assert stats[7] == stats[8] == -1


def test_more_detections_than_count(real: Any) -> None:
    truth = make_truth(5, images=3)
    found = [d for seed in range(12) for d in make_detections(seed, truth)]
    assert max(np.bincount([d['image_id'] for d in found])) > 20
    assert_equal(real, truth, found)


@pytest.mark.parametrize('empty', ['annotations', 'detections'])
def test_nothing_to_match(real: Any, empty: str) -> None:
    truth = make_truth(1)
    found = make_detections(1, truth)
    if empty == 'annotations':
        truth['annotations'] = []
    else:
        found = [d for d in found if d['image_id'] == 0]
    stats = assert_equal(real, truth, found)
    assert set(stats) == ({-1.0} if empty == 'annotations' else {0.0})


def test_annotations_without_counts_and_crowd_flags(real: Any) -> None:
    truth = make_truth(2)
    for person in truth['annotations']:
        del person['num_keypoints'], person['iscrowd']
    assert assert_equal(real, truth, make_detections(2, truth))[0] > 0


def test_real_annotations(real: Any, shared_data: Path) -> None:
    truth = json.loads((shared_data / 'coco' / 'test_coco.json').read_text())
    perfect = [
        {
            **{key: person[key] for key in ('image_id', 'category_id', 'keypoints')},
            'score': 1.0,
        }
        for person in truth['annotations']
        if person['num_keypoints']
    ]
    assert assert_equal(real, truth, perfect)[0] == pytest.approx(1.0)
    for seed in range(5):
        assert_equal(real, truth, make_detections(seed, truth))


def test_real_whole_body_annotations(real: Any, shared_data: Path) -> None:
    truth = json.loads((shared_data / 'coco' / 'test_coco_wholebody.json').read_text())
    found = make_detections(0, truth)
    for detection in found:
        detection['wholebody_score'] = detection['score']
    assert_equal(real, truth, found, iouType='keypoints_wholebody', sigmas=np.full(133, 0.05))


def test_same_answers_to_queries(real: Any, shared_data: Path) -> None:
    path = str(shared_data / 'coco' / 'test_coco.json')
    theirs, ours = real.coco.COCO(path), COCO(path)
    images = sorted(theirs.getImgIds(), reverse=True)
    for kwargs in (
        {},
        {'imgIds': images},
        {'imgIds': images[0]},
        {'imgIds': images, 'catIds': [1]},
        {'imgIds': images, 'iscrowd': False},
        {'imgIds': images[1], 'iscrowd': True},
        {'catIds': 99},
    ):
        assert sorted(ours.getAnnIds(**kwargs)) == sorted(theirs.getAnnIds(**kwargs)), kwargs
    assert ours.loadCats(ours.getCatIds()) == theirs.loadCats(theirs.getCatIds())
    assert ours.loadImgs(images[0]) == theirs.loadImgs(images[0])
    assert (ours.imgs, ours.anns, ours.dataset) == (theirs.imgs, theirs.anns, theirs.dataset)
    assert ours.anno_file == theirs.anno_file


@pytest.mark.parametrize('with_box', [False, True])
def test_same_results_object(real: Any, with_box: bool) -> None:
    truth = make_truth(4)
    found = make_detections(4, truth, with_box)
    theirs = real.coco.COCO('x', ann_data=copy.deepcopy(truth)).loadRes(copy.deepcopy(found))
    ours = COCO('x', ann_data=copy.deepcopy(truth)).loadRes(copy.deepcopy(found))
    assert ours.anns == theirs.anns


def test_test_index(real: Any) -> None:
    truth = make_truth(6)
    theirs = real.coco.COCO('x', test_index=[0, 5], ann_data=copy.deepcopy(truth))
    assert COCO('x', test_index=[0, 5], ann_data=copy.deepcopy(truth)).anns == theirs.anns


def test_crowd_masks_of_bottom_up_training(real: Any) -> None:
    import xtcocotools.mask as theirs
    from faster_coco_eval.core import mask as ours

    polygon = [[10.0, 10.0, 60.0, 12.0, 55.0, 70.0, 8.0, 64.0]]
    masks = [api.decode(api.merge(api.frPyObjects(polygon, 80, 90))) for api in (theirs, ours)]
    assert masks[0].any()
    np.testing.assert_array_equal(masks[0], masks[1])


@pytest.mark.parametrize('kind', ['bbox', 'segm', 'keypoint', ''])
def test_unsupported_type(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"iouType='{kind}' must be one of .*keypoints_wholebody"):
        Params(kind)


def test_no_area_is_needed_with_use_area_off() -> None:
    truth = make_truth(0)
    for person in truth['annotations']:
        del person['area']
    found = make_detections(0, truth)
    assert evaluate((COCO, COCOeval), truth, found, use_area=False)[0] > 0


def test_input_is_left_alone() -> None:
    truth = make_truth(7)
    coco = COCO('x', ann_data=copy.deepcopy(truth))
    found = coco.loadRes(make_detections(7, truth))
    before = copy.deepcopy((coco.dataset, found.dataset))
    evaluation = COCOeval(coco, found)
    evaluation.evaluate()
    assert (coco.dataset, found.dataset) == before
