"""A resumed run draws the random numbers of one that never stopped, whatever the loader draws in between."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, LOOPS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop, Runner
from torch import Tensor

from mm_sharp.hooks.resumed_draws import ResumedDrawsHook
from tests import toy_metric  # noqa: F401  # registers ToyMetric
from tests.tool_runs import SGD
from tests.toys import Batch, ToySamples, same_state, toy_config

pytestmark = [
    pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning'),  # Python 3.12, of fork
    pytest.mark.usefixtures('_no_pause_between_epochs'),
]

SAM = dict(type='SAMOptimWrapper', rho=0.05, optimizer=SGD)
ESAM = dict(type='ESAMOptimWrapper', selection='history', refresh=2, optimizer=SGD)
AUSAM = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.5, optimizer=SGD)
IN_LOADER = dict(batch_sampler=dict(type='AUSAMSampler'))
WORKERS, PERSISTENT = dict(num_workers=2), dict(num_workers=2, persistent_workers=True)
ENDLESS = dict(sampler=dict(type='InfiniteSampler', shuffle=True))


@DATASETS.register_module()
class NoisySamples(ToySamples):
    """Samples with noise from all three global generators."""

    def __getitem__(self, index: int) -> Batch:
        row = dict(super().__getitem__(index))
        row['inputs'] = row['inputs'] + torch.randn(()) * (random.random() + np.random.rand())
        return row


@DATASETS.register_module()
class StillSamples(ToySamples):
    """Samples without noise."""


@LOOPS.register_module()
class UnskippedLoop(IterBasedTrainLoop):  # type: ignore[misc]
    """A user's loop: after a resume it goes on with the loader's first batch."""

    def run(self) -> None:
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        while self._iter < self._max_iters:
            self.run_iter(next(self.dataloader_iterator))


@pytest.fixture
def _no_pause_between_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine waits for two seconds where an iteration-based run has come to the loader's end."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


class Case:
    """One way to load, by epochs of 5 iterations or by iterations.

    Args:
        wrapper: The optimizer wrapper.
        loader: Changes of ``train_dataloader``.
        by_epoch: Four epochs, interrupted after the second; otherwise 14 iterations, interrupted after 7.
        noisy: Whether samples are augmented at random.
        validated: Validation after every epoch, or every 7 iterations, by workers of the same kind.
    """

    def __init__(
        self, wrapper: Any, *loader: dict[str, Any], by_epoch: bool = False, noisy: bool = True, validated: bool = False
    ) -> None:
        self.wrapper, self.by_epoch, self.noisy, self.validated = wrapper, by_epoch, noisy, validated
        self.loader = {key: value for part in loader for key, value in part.items()}

    def config(self, work_dir: Path) -> dict[str, Any]:
        """The Runner's config."""
        interval = 2 if self.by_epoch else 7
        config = toy_config(
            work_dir,
            model=dict(type='ToyNet', dropout=0.3),
            optim_wrapper=copy.deepcopy(self.wrapper),
            train_cfg=dict(by_epoch=True, max_epochs=4) if self.by_epoch else dict(by_epoch=False, max_iters=14),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=self.by_epoch)),
            custom_hooks=[],
        )
        if self.validated:
            config['train_cfg']['val_interval'] = 1 if self.by_epoch else 7
            loader = copy.deepcopy(config['train_dataloader'])
            loader.update({key: value for key, value in self.loader.items() if 'workers' in key})
            config.update(val_dataloader=loader, val_cfg={}, val_evaluator=dict(type='ToyMetric'))
        config['train_dataloader']['dataset']['type'] = 'NoisySamples' if self.noisy else 'StillSamples'
        config['train_dataloader'].update(copy.deepcopy(self.loader))
        return config

    @property
    def interruption(self) -> str:
        """The checkpoint in the middle."""
        return 'epoch_2.pth' if self.by_epoch else 'iter_7.pth'


CASES = {
    'by iterations, sampler in the loader': Case(AUSAM, IN_LOADER, ENDLESS, WORKERS),
    'by iterations, sampler in the loader, persistent': Case(AUSAM, IN_LOADER, ENDLESS, PERSISTENT, validated=True),
    'by iterations, no workers, across epochs': Case(SAM, validated=True),
    'by iterations, no workers, sampler in the loader': Case(AUSAM, IN_LOADER),
    'by iterations, workers, across epochs': Case(ESAM, WORKERS),
    'by iterations, persistent, across epochs': Case(SAM, PERSISTENT),
    'by epochs, no workers': Case(AUSAM, by_epoch=True, validated=True),
    'by epochs, workers': Case(SAM, WORKERS, by_epoch=True, validated=True),
    'by epochs, sampler in the loader': Case(AUSAM, IN_LOADER, WORKERS, by_epoch=True),
    'by epochs, persistent': Case(SAM, PERSISTENT, by_epoch=True, noisy=False),
    'by epochs, persistent, validated': Case(ESAM, PERSISTENT, by_epoch=True, noisy=False, validated=True),
}


def finish(runner: Any) -> Any:
    """Train; workers that only the garbage collector ends would be waited for."""
    runner.train()
    runner.train_loop.dataloader_iterator = runner.train_dataloader._iterator = None
    if runner.val_loop is not None:
        runner.val_dataloader._iterator = None
    return runner


def random_numbers(runner: Any) -> Tensor:
    """The global generator's state in the last checkpoint of a run."""
    state = torch.load((Path(runner.work_dir) / 'last_checkpoint').read_text().strip(), weights_only=True)
    numbers: Tensor = state['optimizer']['mm_sharp']['random_state']['cpu']
    return numbers


def resume(case: Case, tmp_path: Path, kind: type = Runner, **changes: Any) -> Any:
    """A runner that is to go on from the interruption of the run in ``tmp_path / 'straight'``."""
    config = case.config(tmp_path / 'again')
    config.update(resume=True, load_from=str(tmp_path / 'straight' / case.interruption), **changes)
    return kind.from_cfg(config)


# Each loop, and a sampler in the loader; the other pairs of them with what is slow.
FAST = (*('by iterations, no workers, across epochs', 'by epochs, no workers', 'by epochs, sampler in the loader'),)


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_resumed_equals_never_stopped(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    straight = finish(Runner.from_cfg(case.config(tmp_path / 'straight')))
    resumed = finish(resume(case, tmp_path))
    assert same_state(straight.model, resumed.model)
    assert torch.equal(random_numbers(straight), random_numbers(resumed))


def test_under_flexible_runner(tmp_path: Path) -> None:
    case = CASES['by epochs, persistent']
    strategy = dict(strategy=dict(type='SingleDeviceStrategy'), env_cfg={})
    straight = finish(FlexibleRunner.from_cfg({**case.config(tmp_path / 'straight'), **strategy}))
    resumed = finish(resume(case, tmp_path, FlexibleRunner, **strategy))
    assert same_state(straight.model, resumed.model)


def test_a_loop_that_skips_nothing_begins_with_the_state_of_the_checkpoint(tmp_path: Path) -> None:
    case = CASES['by iterations, no workers, across epochs']
    finish(Runner.from_cfg(case.config(tmp_path / 'straight')))
    saved = torch.load(tmp_path / 'straight' / case.interruption)['optimizer']['mm_sharp']['random_state']['cpu']
    resumed = resume(case, tmp_path, train_cfg=dict(type='UnskippedLoop', max_iters=9))
    seen: list[Tensor] = []
    resumed.register_hook(States(seen))
    resumed.train()
    assert torch.equal(seen[0], saved)
    assert not torch.equal(seen[1], saved)


class States(Hook):
    """Notes the global generator's state before each step."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append(torch.get_rng_state())


def test_the_loader_gets_its_generator_back(tmp_path: Path) -> None:
    """The seed of persistent workers is drawn apart for their start alone, and never with a generator of the user's."""
    case = CASES['by epochs, persistent']
    finish(Runner.from_cfg(case.config(tmp_path / 'straight')))
    resumed = finish(resume(case, tmp_path))
    assert resumed.train_dataloader.generator is None
    users = torch.Generator()
    resumed = resume(case, tmp_path, experiment_name='users-generator')
    resumed.train_dataloader.generator = users
    assert finish(resumed).train_dataloader.generator is users


def test_validation_alone_is_left_alone(tmp_path: Path) -> None:
    """Outside training nothing is kept and put back: what validation draws is drawn."""
    case = CASES['by epochs, no workers']
    runner = Runner.from_cfg(case.config(tmp_path / 'alone'))
    before = torch.get_rng_state()
    runner.val()
    assert any(isinstance(hook, ResumedDrawsHook) for hook in runner.hooks)
    assert not torch.equal(torch.get_rng_state(), before)
