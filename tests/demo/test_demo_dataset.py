"""The folder of the demo data: same content however it is made, nothing foreign lost, never half complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mm_sharp.demo import dataset, make_dataset
from tools import make_demo_data

SIZES = {'train': 3, 'val': 2}


def make(out: Path, **options: Any) -> bool:
    return make_dataset(out, **{**SIZES, 'workers': 0, 'progress': False, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / 'meta.json').read_text())
    return meta


def digest_of_files(folder: Path) -> str:
    """The SHA-256 of ``meta.json``, from the files alone: pixels as decoded, annotations as parsed."""
    whole = []
    for split in ('train', 'val'):
        coco = json.loads((folder / f'annotations/person_keypoints_{split}.json').read_text())
        pixels = []
        for image in coco['images']:
            bgr = cv2.imread(str(folder / split / image['file_name']))
            pixels.append(hashlib.sha256(np.ascontiguousarray(bgr[..., ::-1]).tobytes()).hexdigest())
        whole.append([pixels, coco])
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('demo') / 'new' / 'folder'
    assert make(out)
    return out


def test_layout(folder: Path) -> None:
    assert sorted(contents(folder)) == [
        'annotations/person_keypoints_train.json',
        'annotations/person_keypoints_val.json',
        'meta.json',
        'train/000001.png',
        'train/000002.png',
        'train/000003.png',
        'val/000001.png',
        'val/000002.png',
    ]
    meta = read_meta(folder)
    assert meta['arguments'] == {**SIZES, 'seed': 0}
    assert meta['generator_version'] == 1


def test_digest_is_that_of_the_files(folder: Path) -> None:
    assert read_meta(folder)['sha256'] == digest_of_files(folder)


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_do_not_change_a_byte(folder: Path, tmp_path: Path, workers: int) -> None:
    assert make(tmp_path, workers=workers)
    assert contents(tmp_path) == contents(folder)


def test_more_images_leave_the_first_ones_as_they_are(folder: Path, tmp_path: Path) -> None:
    assert make(tmp_path, train=5)
    ours, more = contents(folder), contents(tmp_path)
    for name, content in ours.items():
        if name.endswith('.png'):
            assert more[name] == content, name
    name = 'annotations/person_keypoints_train.json'
    few, many = json.loads(ours[name]), json.loads(more[name])
    assert many['annotations'][: len(few['annotations'])] == few['annotations']
    assert len(many['images']) == 5


def test_another_seed_gives_other_pictures(folder: Path, tmp_path: Path) -> None:
    assert make(tmp_path, seed=1)
    assert read_meta(tmp_path)['sha256'] != read_meta(folder)['sha256']


def test_what_is_there_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(tmp_path)
    monkeypatch.setattr(dataset, 'draw_scene', None)
    assert not make(tmp_path)


def test_a_missing_picture_is_noticed(folder: Path, tmp_path: Path) -> None:
    assert make(tmp_path)
    (tmp_path / 'train/000002.png').unlink()
    assert make(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_other_arguments_need_force(folder: Path, tmp_path: Path) -> None:
    assert make(tmp_path, train=4)
    (tmp_path / 'train' / 'notes.txt').write_text('mine')
    (tmp_path / 'my_annotations.json').write_text('{}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r'--train 4 --val 2 --seed 0 .*, not --train 3 .*--force'):
        make(tmp_path)
    assert contents(tmp_path) == before
    assert make(tmp_path, force=True)
    after = contents(tmp_path)
    assert after.pop('train/notes.txt') == b'mine'
    assert after.pop('my_annotations.json') == b'{}'
    assert after == contents(folder)


def test_another_version_is_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(tmp_path)
    monkeypatch.setattr(dataset, 'GENERATOR_VERSION', 99)
    with pytest.raises(FileExistsError, match=r'generator version 1\), not .*generator version 99'):
        make(tmp_path)


@pytest.mark.parametrize('force', [False, True])
@pytest.mark.parametrize('name', ['holiday.jpg', 'meta.json', 'train/000001.png'])
def test_foreign_folders_are_left_alone(tmp_path: Path, name: str, force: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"generator": "somebody else"}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match='holds other files than a demo data set'):
        make(tmp_path, force=force)
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / 'out').write_text('')
    with pytest.raises(FileExistsError, match='is a file'):
        make(tmp_path / 'out')


def test_interruption_leaves_nothing_complete_and_the_next_call_finishes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = dataset.draw_scene

    def interrupted(seed: int, split: str, index: int, *rest: Any) -> Any:
        if (split, index) == ('val', 1):
            raise KeyboardInterrupt
        return draw(seed, split, index, *rest)

    monkeypatch.setattr(dataset, 'draw_scene', interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, train=5)
    assert 'sha256' not in read_meta(tmp_path)
    monkeypatch.undo()
    assert make(tmp_path)  # also with other arguments: what is incomplete is worth nothing
    assert contents(tmp_path) == contents(folder)


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset.cv2, 'imwrite', lambda *_: False)
    with pytest.raises(OSError, match=r'could not write .*000001.png'):
        make(tmp_path)
    assert 'sha256' not in read_meta(tmp_path)


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere workers do not inherit the patched function')
def test_a_killed_worker_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, 'draw_scene', lambda *_: os._exit(1))
    assert tool(tmp_path, '--workers', '2') == 2
    assert 'terminated abruptly' in capsys.readouterr().err
    assert 'sha256' not in read_meta(tmp_path)


@pytest.mark.parametrize(
    ('argument', 'value'),
    [
        ('train', 0),
        ('train', 1_000_000),
        ('val', -1),
        ('seed', -1),
        ('seed', 2**32),
        ('workers', -1),
        ('train', 2.5),
        ('val', True),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path: Path, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf'{argument}={value} must be a whole number in \['):
        make(tmp_path / 'out', **{argument: value})
    assert not (tmp_path / 'out').exists()


def tool(out: Path, *options: str) -> int:
    return make_demo_data.main(['--out', str(out), '--train', '3', '--val', '2', '--workers', '1', *options])


def test_tool_draws_and_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(tmp_path) == 0
    assert '3 training and 2 validation images drawn' in capsys.readouterr().out
    assert contents(tmp_path) == contents(folder)
    assert tool(tmp_path) == 0
    assert 'are already there' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--train', '0'], 'train=0 must be a whole number in [1, 999999]'),
        (['--workers', '-3'], 'workers=-3 must be'),
    ],
)
def test_tool_reports_errors_in_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(tmp_path / 'out', *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_tool_reports_a_foreign_folder_and_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'holiday.jpg').write_text('')
    assert tool(tmp_path) == 2
    assert 'choose another folder with --out' in capsys.readouterr().err

    def interrupted(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_demo_data, 'make_dataset', interrupted)
    assert tool(tmp_path) == 130
    assert 'run it again to finish' in capsys.readouterr().err


def test_tool_uses_the_package_beside_it(tmp_path: Path) -> None:
    (tmp_path / 'tools').mkdir()
    copied = shutil.copy(make_demo_data.__file__, tmp_path / 'tools')
    (tmp_path / 'mm_sharp' / 'demo').mkdir(parents=True)
    (tmp_path / 'mm_sharp' / '__init__.py').touch()
    (tmp_path / 'mm_sharp' / 'demo' / '__init__.py').write_text('def make_dataset(*_, **__): return False')
    command = [sys.executable, copied, '--out', str(tmp_path / 'out'), '--train', '1', '--val', '1']
    assert 'already there' in subprocess.run(command, capture_output=True, text=True).stdout


def test_tool_names_no_default_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_demo_data.parse_arguments(['--help'])
    shown = capsys.readouterr().out
    assert 'None' not in shown
    assert '(default: 2048)' in shown
