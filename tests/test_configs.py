"""Every config builds, trains two steps and survives being written out; and the two ways into a user's config."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

import mm_sharp  # noqa: F401  (makes `mm_sharp::` known)
from mm_sharp.cli import UsageError
from mm_sharp.preflight import check_wrappers
from mm_sharp.two_pass import TwoPassOptimWrapper
from tests.conftest import ROOT
from tests.mmpose_cases import without_pretrained
from tests.tiny_data import draw_coco, draw_mpii

FOLDER = ROOT / 'configs'
# Those of another package are tested in a file of their own.
CONFIGS = sorted(path for path in FOLDER.rglob('*.py') if not {'_base_', 'classification'} & {*path.parts})
METHODS = ('sam', 'esam', 'ausam')
RECIPES = [path for path in CONFIGS if path.parent.name in METHODS and 'loader' not in path.stem]
(LOADER,) = (path for path in CONFIGS if 'loader' in path.stem)
DEMOS = [path for path in CONFIGS if path.parent.name == 'demo']
# Seconds each, and nothing in them that SAM's recipe and the same head's other recipe do not have.
TOO_LONG = [path for path in CONFIGS if 'hrnet' in path.stem and path.parent.name != 'sam']
# Class and what it sets, by fragment; the name ends what is the fragment's part of a config's name.
FRAGMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    'sam': ('SAMOptimWrapper', {'rho': 0.05}),
    'asam': ('SAMOptimWrapper', {'rho': 0.5, 'adaptive': True, 'eta': 0.01}),
    'esam': ('ESAMOptimWrapper', {'rho': 0.05, 'beta': 0.6, 'gamma': 0.5}),
    'esam_history': (
        'ESAMOptimWrapper',
        {'rho': 0.05, 'beta': 0.6, 'gamma': 0.5, 'selection': 'history', 'refresh': 10},
    ),
    'ausam': ('AUSAMOptimWrapper', {'rho': 0.05, 'sampling_ratio': 0.6, 's_min': 0.3, 's_max': 1.0}),
}
# Samples in each forward pass of the first two steps on four people.
PASSES = {
    '': [4, 4],
    'sam': [4, 4, 4, 4],
    'esam': [4, 4, 2, 4, 4, 2],  # the one in the middle selects
    'esam_history': [4, 4, 2, 4, 2],  # selects in the first step only
    'ausam': [3, 3, 3, 3],  # ceil(0.6 * 4)
}
RECIPE = 'mmpose::body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py'
VITPOSE = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_ViTPose-small_8xb64-210e_coco-256x192.py'
OWN = {'optim_wrapper', 'custom_hooks', 'custom_imports', 'sharp_optim_wrapper', 'sharp_hook'}

# Warnings of the dependencies' own.
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in (
        '.*MultiScaleDeformableAttention.* has been moved',
        '.*torch.cuda.amp.autocast.* is deprecated',
        'The metainfo config file .* does not exist',
        'Use the existing "bbox_center"',
    )
]


def name(path: Path) -> str:
    return path.stem


def use_data(cfg: Config, folder: Path) -> None:
    """Point the training set to four people: real pictures where they are, else drawn ones."""
    dataset = cfg.train_dataloader.dataset
    kind = 'mpii' if dataset.type == 'MpiiDataset' else 'coco'
    real = ROOT.parent / 'shared' / 'data' / kind
    if real.is_dir():
        places = {'data_root': str(real), 'ann_file': f'test_{kind}.json', 'data_prefix': {'img': ''}}
    elif kind == 'mpii':
        draw_mpii(folder)
        places = {'data_root': str(folder), 'ann_file': 'annotations/mpii_train.json', 'data_prefix': {'img': 'images'}}
    else:
        draw_coco(folder)
        places = {
            'data_root': str(folder),
            'ann_file': 'annotations/person_keypoints_train.json',
            'data_prefix': {'img': 'train'},
        }
    dataset.update(places, indices=4)
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)


class Losses(Hook):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.values.append(outputs['loss'].item())


def two_steps(cfg: Config, folder: Path) -> Runner:
    """A Runner for two steps of one epoch, without validation."""
    use_data(cfg, folder / 'data')
    without_pretrained(cfg._cfg_dict)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.default_hooks.checkpoint.interval = 2  # none: HRNet's would take seconds to write
    cfg.default_hooks.checkpoint.save_last = False
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(folder / 'work')
    # MMEngine keeps one message hub and one visualizer for each name.
    cfg.experiment_name = cfg.visualizer.name = folder.name
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_two_training_steps(path: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    runner = two_steps(cfg, tmp_path)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    losses = Losses()
    runner.register_hook(losses)
    runner.train()

    assert len(losses.values) == 2
    assert all(math.isfinite(loss) for loss in losses.values)
    after = runner.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    sharp = 'sharp_optim_wrapper' in cfg
    assert isinstance(runner.optim_wrapper, SAMOptimWrapper) == sharp
    logged = {key.rpartition('/')[2] for key in runner.message_hub.log_scalars}
    assert ('sharpness' in logged) == sharp


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_written_and_read_again_it_is_the_same(path: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('path', [path for path in CONFIGS if path.parent.name == 'sam'], ids=name)
def test_a_recipe_of_ours_changes_only_what_it_must(path: Path, tmp_path: Path) -> None:
    recipe = re.search(r"'(mmpose::.+)'", path.read_text())
    assert recipe is not None
    ours, theirs = Config.fromfile(path).to_dict(), user_config(tmp_path, f"_base_ = '{recipe[1]}'").to_dict()
    wrapper, hooks = ours['optim_wrapper'], ours['custom_hooks']

    assert {key: value for key, value in ours.items() if key not in OWN} == {
        key: value for key, value in theirs.items() if key not in OWN
    }
    assert (wrapper.pop('type'), wrapper.pop('rho')) == ('SAMOptimWrapper', 0.05)
    assert wrapper == {key: value for key, value in theirs['optim_wrapper'].items() if key != 'type'}
    assert hooks == [*theirs['custom_hooks'], {'type': 'SharpnessHook'}]


@pytest.mark.parametrize('fragment', ['sam', 'asam'])
def test_a_fragment_beside_a_recipe(tmp_path: Path, fragment: str) -> None:
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{RECIPE}', 'mm_sharp::_base_/{fragment}.py']",
        'optim_wrapper = _base_.sharp_optim_wrapper',
        'custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]',
    )
    assert cfg.optim_wrapper.type == 'SAMOptimWrapper'
    assert cfg.optim_wrapper.get('adaptive', False) == (fragment == 'asam')
    assert cfg.optim_wrapper.optimizer.type == 'Adam'  # the recipe's
    assert [hook.type for hook in cfg.custom_hooks] == ['SyncBuffersHook', 'SharpnessHook']
    check_wrappers(cfg)


def test_a_fragment_beside_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    cfg = user_config(
        tmp_path,
        "_base_ = ['mmpose::_base_/default_runtime.py', 'mm_sharp::_base_/sam.py']",
        "optim_wrapper = dict(_base_.sharp_optim_wrapper, rho=0.1, optimizer=dict(type='SGD', lr=0.1))",
    )
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.rho, wrapper.optimizer.type) == ('SAMOptimWrapper', 0.1, 'SGD')
    check_wrappers(cfg)


def test_a_fragment_that_is_not_used_is_refused(tmp_path: Path) -> None:
    cfg = user_config(tmp_path, f"_base_ = ['{RECIPE}', 'mm_sharp::_base_/sam.py']")
    with pytest.raises(UsageError, match=r'optim_wrapper = _base_\.sharp_optim_wrapper'):
        check_wrappers(cfg)


def test_one_line_in_a_recipe(tmp_path: Path) -> None:
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{RECIPE}']",
        "custom_imports = dict(imports=['mm_sharp'])",
        "optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05)",
    )
    assert cfg.optim_wrapper.optimizer.type == 'Adam'
    check_wrappers(cfg)


def test_one_line_in_a_recipe_with_imports_of_its_own(tmp_path: Path) -> None:
    """ViTPose imports its layer decay by `custom_imports`: that list is continued, and the decay stays."""
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{VITPOSE}']",
        "custom_imports = dict(imports=[*_base_.custom_imports.imports, 'mm_sharp'])",
        "optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05)",
    )
    assert len(cfg.custom_imports.imports) == 2
    assert cfg.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    check_wrappers(cfg)


def user_config(folder: Path, *lines: str) -> Config:
    file = folder / 'user.py'
    file.write_text('\n'.join(lines))
    return Config.fromfile(file)
