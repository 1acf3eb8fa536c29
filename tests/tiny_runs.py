"""Runs of a few steps on a few points, with everything that ends up in a checkpoint."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

SAM = {'type': 'SAMOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.01}}
PLAIN = {'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.01}}


class Points(Dataset):
    """Eight points, with a description that holds arrays as MMPose's does."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(8, 4, generator=generator)
        self.metainfo = {'sigmas': np.linspace(0.1, 0.2, 3), 'colors': np.arange(6).reshape(2, 3), 'name': 'x'}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'inputs': self.inputs[index], 'targets': self.inputs[index].sum()}


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, mode: str) -> Any:
        output = self.linear(inputs)[:, 0]
        return {'loss': (output - targets).square().mean()} if mode == 'loss' else list(output)


class Mean(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(sample) for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {'mean': float(np.mean(results))}


_numbers = itertools.count()


def make_runner(work_dir: Path, optim_wrapper: Any = SAM, **kwargs: Any) -> Runner:
    """A runner over two epochs of two steps each.

    Runners of the same name and second share a log, hence the names.
    """
    return Runner(
        **{
            'model': Net(),
            'work_dir': str(work_dir),
            'train_dataloader': DataLoader(Points(), batch_size=4),
            'train_cfg': {'by_epoch': True, 'max_epochs': 2},
            'optim_wrapper': optim_wrapper,
            'test_dataloader': DataLoader(Points(), batch_size=4),
            'test_cfg': {},
            'test_evaluator': [Mean()],
            'experiment_name': f'plain{next(_numbers)}',
            'default_hooks': {'logger': {'type': 'LoggerHook', 'interval': 1}},
            'randomness': {'seed': 0},
            'log_level': 'WARNING',
            **kwargs,
        }
    )


@contextmanager
def record_warnings(runner: Runner) -> Iterator[list[str]]:
    """The warnings that a runner's logger gets, which it does not pass on to pytest."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    runner.logger.addHandler(handler)
    yield lines
    runner.logger.removeHandler(handler)
