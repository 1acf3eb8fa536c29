"""A quantized model on a few real COCO images, as a user makes it: train, fine-tune, test, export, draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mm_sharp.cli import options as cli
from tests.conftest import ROOT
from tests.tool_runs import tool as load

pytestmark = pytest.mark.slow

DEMO = ROOT / 'configs' / 'demo'
# The demo's model at half its width again, on the real images: 14 people, an iteration an epoch.
TEXT = """
_base_ = '{base}'
model = dict(backbone=dict(stem_channels=16, base_channels=16), head=dict(in_channels=128))
places = dict(num_workers=0, persistent_workers=False, batch_size=14, drop_last=False, dataset=dict(
    data_root='', ann_file='{coco}/test_coco.json', data_prefix=dict(img='{coco}/')))
train_dataloader = val_dataloader = test_dataloader = places
val_evaluator = test_evaluator = [
    dict(type='CocoMetric', ann_file='{coco}/test_coco.json'),
    dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'),
]
param_scheduler = []
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={epochs}))
"""


def run(folder: Path, tool: str, *arguments: object) -> str:
    """What a tool prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / tool, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def within(folder: Path, name: str, *arguments: object) -> None:
    """Run a tool in this process: what it imports is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, arguments)])
        patch.setattr('mm_sharp.compat.checkpoint_hook._in_every_run', False)
        assert cli.run_tool(load(name).main) == 0


@pytest.fixture(scope='module')
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a float model has been trained, and from it a quantized one."""
    folder = tmp_path_factory.mktemp('real')
    coco = shared_data / 'coco'
    plain = DEMO / 'simcc_res18-half_demo-128x96.py'
    quantized = DEMO / 'simcc_res18-half_w8a8_ausam_demo-128x96.py'
    (folder / 'float.py').write_text(TEXT.format(base=plain, coco=coco, epochs=16))
    load_from = "load_from = 'work_dirs/float/epoch_16.pth'\n"
    (folder / 'w8a8.py').write_text(TEXT.format(base=quantized, coco=coco, epochs=4) + load_from)
    # A process keeps one visualizer of each name.
    within(folder, 'train', 'float.py', '--cfg-options', 'visualizer.name=real-float')
    (folder / 'training.txt').write_text(run(folder, 'train.py', 'w8a8.py'))
    return folder


@pytest.fixture(scope='module')
def exported(folder: Path) -> Path:
    """The quantized model as ONNX."""
    within(folder, 'export', 'w8a8.py', 'work_dirs/w8a8/epoch_4.pth', '--out', 'model.onnx', '--images', 14)
    return folder / 'model.onnx'


def test_training_tells_what_it_does(folder: Path) -> None:
    log = (folder / 'training.txt').read_text()
    assert '23 of 23 layers are quantized' in log
    assert 'Loaded the checkpoint of a float model: all' in log
    assert 'Calibrating the quantizers on 1 training batches' in log
    assert 'Before training (post-training quantization, post_training.pth):  coco/AP' in log


def test_testing_gives_what_validation_gave(folder: Path) -> None:
    within(
        folder,
        'test',
        'w8a8.py',
        'work_dirs/w8a8/epoch_4.pth',
        '--out',
        'metrics.json',
        '--cfg-options',
        'visualizer.name=real-test',
    )
    metrics = json.loads((folder / 'metrics.json').read_text())
    (log,) = (folder / 'work_dirs' / 'w8a8').glob('*/vis_data/scalars.json')
    validated = [line for line in map(json.loads, log.read_text().splitlines()) if 'coco/AP' in line][-1]
    assert metrics['PCK'] == pytest.approx(validated['PCK'], abs=1e-6)
    assert metrics['PCK'] > 0.2  # it has learned something of these people


def test_the_exported_file_is_smaller_than_the_float_model(folder: Path, exported: Path) -> None:
    # Checked against PyTorch by the tool itself, whose exit code was 0. The checkpoint holds Adam's state as well.
    assert exported.stat().st_size < (folder / 'work_dirs' / 'float' / 'epoch_16.pth').stat().st_size / 8


def test_keypoints_are_drawn_on_a_picture(shared_data: Path, folder: Path, exported: Path) -> None:
    annotations = json.loads((shared_data / 'coco' / 'test_coco.json').read_text())
    person = max(annotations['annotations'], key=lambda item: item['bbox'][2] * item['bbox'][3])
    name = next(image['file_name'] for image in annotations['images'] if image['id'] == person['image_id'])
    picture = shared_data / 'coco' / name
    within(folder, 'draw_keypoints', exported, picture, '--bbox', *person['bbox'], '--out', 'drawn.png')
    before, after = cv2.imread(str(picture)), cv2.imread(str(folder / 'drawn.png'))
    assert before.shape == after.shape
    changed = np.argwhere((before != after).any(axis=2))
    x, y, width, height = person['bbox']
    centre = changed[:, ::-1].mean(axis=0)
    assert len(changed) > 50
    assert x - 0.25 * width < centre[0] < x + 1.25 * width
    assert y - 0.25 * height < centre[1] < y + 1.25 * height
