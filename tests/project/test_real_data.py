"""Training on a few real COCO images: the loss falls, evaluation runs, and a run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

import mm_sharp  # noqa: F401  (registers the wrapper and `mm_sharp::` for the config)
from tests.conftest import ROOT
from tests.toys import same_bits

pytestmark = pytest.mark.slow

EPOCHS = 24


def real_config(shared_data: Path, work_dir: Path, epochs: int) -> Config:
    """The demo's SAM config, half as wide, on the real images: 14 people, one iteration an epoch, no flips or noise."""
    config = Config.fromfile(ROOT / 'configs/demo/simcc_res18-half_sam_demo-128x96.py')
    config.model.backbone.update(stem_channels=16, base_channels=16)
    config.model.head.in_channels = 128
    annotations = str(shared_data / 'coco' / 'test_coco.json')
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=14, drop_last=False)
        loader.dataset.update(data_root='', ann_file=annotations, data_prefix=dict(img=str(shared_data / 'coco') + '/'))
    augmentations = ('RandomFlip', 'RandomBBoxTransform')
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in pipeline if step['type'] not in augmentations]
    for evaluators in (config.val_evaluator, config.test_evaluator):
        evaluators[0].ann_file = annotations
    config.train_cfg.update(max_epochs=epochs, val_interval=EPOCHS)
    config.param_scheduler = []
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=4)
    config.work_dir = str(work_dir)
    config.experiment_name = config.visualizer.name = '-'.join(work_dir.parts[-2:])
    config.log_level = 'WARNING'
    return config


def losses(runner: Runner) -> list[float]:
    values: list[float] = runner.message_hub.get_scalar('train/loss').data[0].tolist()
    return values


@pytest.fixture(scope='module')
def straight(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, dict[str, Any]]:
    runner = Runner.from_cfg(real_config(shared_data, tmp_path_factory.mktemp('real') / 'straight', EPOCHS))
    runner.train()
    metrics = {key: history.current() for key, history in runner.message_hub.log_scalars.items() if 'val/' in key}
    return runner, metrics


def test_the_loss_falls(straight: tuple[Runner, dict[str, Any]]) -> None:
    runner, _ = straight
    history = losses(runner)
    assert len(history) == EPOCHS
    assert history[-1] < 0.8 * history[0]


def test_the_sharpness_is_logged(straight: tuple[Runner, dict[str, Any]]) -> None:
    runner, _ = straight
    sharpness = runner.message_hub.get_scalar('train/sharpness/sharpness').data[0]
    assert len(sharpness) == EPOCHS
    assert (sharpness > 0).all()


def test_evaluation_gives_ap_and_pck(straight: tuple[Runner, dict[str, Any]]) -> None:
    _, metrics = straight
    assert 0.0 <= metrics['val/coco/AP'] <= 1.0
    assert 0.0 < metrics['val/PCK'] <= 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_resuming_equals_never_having_stopped(
    straight: tuple[Runner, dict[str, Any]], shared_data: Path, tmp_path: Path
) -> None:
    runner, _ = straight
    config = real_config(shared_data, tmp_path / 'resumed', EPOCHS)
    config.load_from, config.resume = str(Path(runner.work_dir) / 'epoch_20.pth'), True
    resumed = Runner.from_cfg(config)
    resumed.train()
    assert losses(resumed) == losses(runner)
    left, right = runner.model.state_dict(), resumed.model.state_dict()
    assert all(same_bits(left[name], right[name]) for name in left)


@pytest.mark.parametrize('in_loader', [False, True], ids=['in the wrapper', 'in the loader'])
def test_ausam_keeps_scores_of_real_people(shared_data: Path, tmp_path: Path, in_loader: bool) -> None:
    config = real_config(shared_data, tmp_path / 'ausam', 3)
    config.optim_wrapper.update(type='AUSAMOptimWrapper', sampling_ratio=0.5)
    config.train_dataloader.batch_size = 5
    if in_loader:
        config.train_dataloader.batch_sampler = dict(type='AUSAMSampler')
    runner = Runner.from_cfg(config)
    runner.train()
    with (shared_data / 'coco' / 'test_coco.json').open() as file:
        people = {annotation['id'] for annotation in json.load(file)['annotations']}
    state = runner.optim_wrapper.history.state_dict()['data_sets']
    assert state.keys() == {'coco'}
    assert set(state['coco']['ids'].tolist()) <= people
    count = len(runner.train_dataloader.dataset)
    sizes = [min(5, count - start) for start in range(0, count, 5)]
    # The first of three epochs uses whole batches, and so all have been seen.
    assert state['coco']['visits'].sum() == count + 2 * sum(math.ceil(size / 2) for size in sizes)
    assert len(state['coco']['ids']) == count
    assert (state['coco']['averages'] > 0).all()


def test_predictions_are_drawn(straight: tuple[Runner, dict[str, Any]], tmp_path: Path, shared_data: Path) -> None:
    runner, _ = straight
    config = real_config(shared_data, tmp_path / 'drawn', EPOCHS)
    config.load_from = str(Path(runner.work_dir) / f'epoch_{EPOCHS}.pth')
    config.default_hooks.visualization = dict(type='PoseVisualizationHook', enable=True, interval=1, out_dir='pictures')
    Runner.from_cfg(config).test()
    assert len(list((tmp_path / 'drawn').rglob('pictures/*.jpg'))) >= 1
