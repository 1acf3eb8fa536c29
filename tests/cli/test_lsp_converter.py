"""The converter of Leeds Sports Pose Extended, on a made-up archive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.lsp_archive import COLOURS, draw_archive
from tests.tool_runs import tool

SMALL = ('--people', '20', '--select', '3', '--val', '4')


@pytest.fixture(scope='module')
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp('lsp') / 'raw'
    return folder, draw_archive(folder)


@pytest.fixture(scope='module')
def converted(archive: tuple[Path, np.ndarray]) -> Path:
    folder = archive[0].parent / 'out'
    convert(archive[0], folder, '--quality', '98')
    return folder


def convert(source: Path, out: Path, *arguments: str) -> None:
    tool('dataset_converters/lsp').main([str(source), '--out', str(out), *SMALL, *arguments])


def read(folder: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f'{split}.json').read_text())
    return content


def everyone(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pictures' and people's entries, in the order of the original."""
    contents = [read(folder, split) for split in ('train', 'select', 'val')]
    pairs = [pair for content in contents for pair in zip(content['images'], content['annotations'], strict=True)]
    return sorted(pairs, key=lambda pair: int(pair[0]['id']))


def test_keypoints_are_where_the_joints_are_in_the_new_pictures(converted: Path) -> None:
    compared = 0
    for image, person in everyone(converted):
        picture = cv2.imread(str(converted / 'images' / image['file_name']))
        assert picture.shape[:2] == (image['height'], image['width'])
        assert max(picture.shape) <= 160
        for (x, y, seen), colour in zip(np.reshape(person['keypoints'], (14, 3)), COLOURS, strict=True):
            if seen:
                found = picture[round(y), round(x)].astype(int)
                assert np.abs(found - colour).max() < 40, (image['file_name'], x, y)
                compared += 1
    assert compared == 20 * 14 - 1 - 1 - 14


def test_only_joints_that_are_visible_and_in_the_picture_are_annotated(converted: Path) -> None:
    people = [np.reshape(person['keypoints'], (14, 3)) for _, person in everyone(converted)]
    for row, points in enumerate(people):
        hidden = {1: [4], 2: [5], 3: list(range(14))}.get(row, [])
        assert np.flatnonzero(points[:, 2] == 0).tolist() == hidden
        assert (points[hidden] == 0).all()
        assert set(points[:, 2]) <= {0, 2}
    counts = [person['num_keypoints'] for _, person in everyone(converted)]
    assert counts == [14, 13, 13, 0, *[14] * 16]


def test_a_box_is_a_fifth_larger_than_its_visible_joints(converted: Path) -> None:
    for _, person in everyone(converted):
        points = np.reshape(person['keypoints'], (14, 3))
        seen = points[points[:, 2] > 0, :2]
        if len(seen):
            x, y, w, h = person['bbox']
            low, high = seen.min(0), seen.max(0)
            np.testing.assert_allclose((w, h), 1.2 * (high - low), atol=0.3)
            np.testing.assert_allclose((x + w / 2, y + h / 2), (low + high) / 2, atol=0.3)
            assert person['area'] == pytest.approx(w * h, rel=0.01)


def test_splits_are_stretches_of_the_original_and_the_training_people_are_mixed(converted: Path) -> None:
    order = {split: [image['id'] for image in read(converted, split)['images']] for split in ('train', 'select', 'val')}
    assert order['select'] == [14, 15, 16]
    assert order['val'] == [17, 18, 19, 20]
    assert sorted(order['train']) == list(range(1, 14))
    assert order['train'] != sorted(order['train'])
    for split in order:
        content = read(converted, split)
        assert [person['image_id'] for person in content['annotations']] == order[split]


def test_the_numbers_of_the_study_take_its_people(archive: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Of 20 people, seven are spread over the original evenly, the first and the last among them."""
    convert(archive[0], tmp_path / 'few', '--people', '7', '--select', '1', '--val', '2')
    assert [image['id'] for image, _ in everyone(tmp_path / 'few')] == [1, 4, 7, 11, 14, 17, 20]


def test_a_zip_file_gives_what_its_folder_gives(
    archive: tuple[Path, np.ndarray], converted: Path, tmp_path: Path
) -> None:
    # The original's content is in a folder of the archive, or not.
    for root in (archive[0], archive[0].parent):
        inside = shutil.make_archive(str(tmp_path / 'lspet'), 'zip', root, 'raw' if root != archive[0] else '.')
        convert(Path(inside), tmp_path / 'out', '--quality', '98')
        for split in ('train', 'select', 'val'):
            assert read(tmp_path / 'out', split) == read(converted, split)
        assert (tmp_path / 'out/images/im00007.jpg').read_bytes() == (converted / 'images/im00007.jpg').read_bytes()


@pytest.mark.parametrize(
    ('source', 'arguments', 'message'),
    [
        ('nowhere', (), 'is neither a folder nor a zip file'),
        ('.', (), 'has no joints.mat'),
        ('raw', ('--val', '17'), 'leave nobody of 20 people to train on'),
        ('raw', ('--side', '2'), '--side 2: it must be an integer from 8'),
        ('raw', ('--out', '/dev/null/lsp'), "the folder '/dev/null/lsp/images' cannot be made"),
    ],
)
def test_what_is_wrong_is_said(
    archive: tuple[Path, np.ndarray], tmp_path: Path, source: str, arguments: tuple[str, ...], message: str
) -> None:
    folder = {'raw': archive[0], '.': tmp_path, 'nowhere': tmp_path / 'nowhere'}[source]
    with pytest.raises(UsageError, match=message):
        convert(folder, tmp_path / 'out', *arguments)


def test_the_recipes_keypoints_are_the_converters(converted: Path) -> None:
    from mmengine.config import Config

    info = Config.fromfile(ROOT / 'configs/lsp/_base_/metainfo.py').dataset_info
    names = [info.keypoint_info[i].name for i in range(14)]
    category = read(converted, 'val')['categories'][0]
    assert category['keypoints'] == names
    swaps = {point.name: point.swap for point in info.keypoint_info.values()}
    mirrored = {'left': 'right', 'right': 'left'}
    for name, swap in swaps.items():
        side, _, part = name.partition('_')
        assert swap == (f'{mirrored[side]}_{part}' if side in mirrored else '')
    bones = {frozenset((names[a - 1], names[b - 1])) for a, b in category['skeleton']}
    assert bones <= {frozenset(bone.link) for bone in info.skeleton_info.values()}
