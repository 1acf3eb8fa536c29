"""Two training steps of a config, on a few people."""

from __future__ import annotations

import functools
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from tests.conftest import ROOT
from tests.mmpose_cases import without_pretrained
from tests.tiny_data import draw_coco, draw_mpii

# Warnings of the dependencies' own, raised while recipes are read and run.
QUIET = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in (
        '.*MultiScaleDeformableAttention.* has been moved',
        '.*torch.cuda.amp.autocast.* is deprecated',
        'The metainfo config file .* does not exist',
        'Use the existing "bbox_center"',
    )
]
# Two steps: people in the data set, people in a batch, and samples in each forward pass.
STEPS = {
    'OptimWrapper': (4, 2, [2, 2]),
    'SAMOptimWrapper': (4, 2, [2, 2, 2, 2]),
    'ESAMOptimWrapper': (4, 2, [2, 2, 1, 2, 2, 1]),  # all, all to select, selected
    'ESAMOptimWrapper-history': (4, 4, [4, 4, 2, 4, 2]),  # the second step selects by what the first one measured
    'AUSAMOptimWrapper': (3, 3, [3, 3, 2, 2]),  # the first of two epochs whole, then ceil(0.5 * 3)
    'AUSAMOptimWrapper-constant': (3, 3, [2, 2, 2, 2]),  # ceil(0.6 * 3)
    'SAMOptimWrapper-interval': (4, 2, [2, 2, 2]),
    'LookSAMOptimWrapper': (4, 2, [2, 2, 2]),
    'FriendlySAMOptimWrapper': (4, 2, [2, 2, 2, 2]),
    'GSAMOptimWrapper': (4, 2, [2, 2, 2, 2]),
    'WSAMOptimWrapper': (4, 2, [2, 2, 2, 2]),
    'MSAMOptimWrapper': (4, 2, [2, 2]),
}


def read(path: Path) -> Config:
    """A config file, read once; the caller may change what it gets."""
    return deepcopy(_read(path))


@functools.cache
def _read(path: Path) -> Config:
    return Config.fromfile(path)


def name(path: Path) -> str:
    """What a test of a config is called."""
    return path.stem


def method(cfg: Config) -> str:
    """A key of ``STEPS``."""
    wrapper = cfg.optim_wrapper
    variant = [wrapper.get('selection'), wrapper.get('interval') and 'interval', wrapper.get('schedule')]
    return '-'.join([wrapper.get('type', 'OptimWrapper'), *filter(None, variant)])


def inherited(path: Path) -> str:
    """The recipe of MMPose's that one of ours is made of."""
    (recipe,) = re.findall(r"'(mmpose::.+?)'", path.read_text())
    return recipe


def use_data(cfg: Config, folder: Path, people: int) -> None:
    """Point the training set to a few people: real pictures where they are, else drawn ones."""
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
    dataset.update(places, indices=people)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)


def cost(wrapper: dict[str, Any], batch_size: int) -> float:
    """A step's cost over the base optimizer's, with forward = 1 and backward = 2, half of which are the weights'."""
    kind = wrapper.get('type', 'OptimWrapper')
    if kind == 'AUSAMOptimWrapper':
        return 2 * math.ceil(wrapper['sampling_ratio'] * batch_size) / batch_size
    if kind == 'ESAMOptimWrapper':
        selections = 1 / wrapper['refresh'] if wrapper.get('selection') == 'history' else 1.0
        second = math.ceil(wrapper['gamma'] * batch_size) / batch_size
        return float(2 + wrapper['beta'] + selections + 3 * second) / 3
    return {'OptimWrapper': 1.0, 'SAMOptimWrapper': 2.0}[kind]


class Steps(Hook):
    """Collects the loss of every step, the samples in every batch and forward pass, and what was trained."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[int] = []
        self.passes: list[int] = []
        self.trained: set[nn.Parameter] = set()

    def before_train(self, runner: Any) -> None:
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._collect)
        runner.model.backbone.register_forward_pre_hook(lambda _, args: self.passes.append(len(args[0])))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(len(data_batch['inputs']))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs['loss'].item())

    def _collect(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        self.trained |= {p for p in parameters if p.grad is not None and bool(p.grad.any())}

    def left_out(self, model: nn.Module) -> list[str]:
        """Names of the parameters that had no gradient in any step, or one of zeros."""
        return [name for name, parameter in model.named_parameters() if parameter not in self.trained]


def two_steps(cfg: Config, folder: Path, load_from: Path | None = None) -> Runner:
    """A Runner for two steps, without validation and, unless it is given, without a checkpoint to start from."""
    people, batch_size, _ = STEPS[method(cfg)]
    use_data(cfg, folder / 'data', people)
    cfg.train_dataloader.batch_size = batch_size
    without_pretrained(cfg._cfg_dict)
    cfg.load_from = load_from and str(load_from)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.train_cfg.max_epochs = 2 * batch_size // people
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.default_hooks.checkpoint.interval = 3  # none: HRNet's would take seconds to write
    cfg.default_hooks.checkpoint.save_last = False
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(folder / 'work')
    # MMEngine keeps one message hub and one visualizer for each name.
    cfg.experiment_name = cfg.visualizer.name = folder.name
    return Runner.from_cfg(cfg)
