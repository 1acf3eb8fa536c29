"""MMEngine's FlexibleRunner in one process: as its Runner, resumed at the right epoch, and built by the tools."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from torch.utils.data import DataLoader

from mm_sharp.cli.loading import check_checkpoint, last_checkpoint
from mm_sharp.cli.process import build_runner
from mm_sharp.compat.plain_checkpoint import TAG, from_plain
from mm_sharp.errors import UsageError
from tests.tiny_runs import PLAIN, SAM, Mean, Net, Points
from tests.toys import make, same_state, toy_config

_numbers = itertools.count()
AUSAM = dict(type='AUSAMOptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))


def flexible(work_dir: Path, optim_wrapper: Any, epochs: int = 2, **changes: Any) -> FlexibleRunner:
    """A run whose every validation finds a better score than the last."""

    class Rising(Mean):
        values = itertools.count()

        def compute_metrics(self, results: list[float]) -> dict[str, float]:
            return {'mean': float(next(self.values))}

    torch.manual_seed(0)
    checkpoint = dict(type='CheckpointHook', interval=1, save_best='mean', rule='greater')
    return FlexibleRunner(
        model=Net(),
        work_dir=str(work_dir),
        train_dataloader=DataLoader(Points(), batch_size=4),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=copy.deepcopy(optim_wrapper),
        val_dataloader=DataLoader(Points(), batch_size=4),
        val_cfg={},
        val_evaluator=[Rising()],
        experiment_name=f'flexible{next(_numbers)}',
        default_hooks=dict(checkpoint=checkpoint),
        randomness=dict(seed=0),
        log_level='ERROR',
        **changes,
    )


def epoch_of(file: Path) -> int:
    """The epoch that a checkpoint says it is of, two iterations each."""
    meta = torch.load(file, weights_only=False)['meta']
    assert meta['iter'] == 2 * meta['epoch']
    return int(meta['epoch'])


def test_a_checkpoint_saved_again_after_validation_is_of_its_own_epoch(tmp_path: Path) -> None:
    whole = flexible(tmp_path / 'whole', SAM)
    whole.train()
    assert [epoch_of(tmp_path / 'whole' / f'epoch_{epoch}.pth') for epoch in (1, 2)] == [1, 2]
    resumed = flexible(tmp_path / 'resumed', SAM, resume=True, load_from=str(tmp_path / 'whole' / 'epoch_1.pth'))
    resumed.train()
    assert same_state(whole.model, resumed.model)
    assert resumed.iter == whole.iter == 4
    assert 'save_checkpoint' not in vars(whole.strategy)


def test_other_runs_keep_their_behaviour(tmp_path: Path) -> None:
    """It is MMEngine's, and the reason for the repair: should this fail, the repair is not needed any more."""
    flexible(tmp_path, PLAIN, epochs=1).train()
    meta = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == (2, 2)


@pytest.mark.parametrize('wrapper', [SAM, AUSAM], ids=['sam', 'ausam'])
def test_the_same_weights_as_under_runner(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    models = []
    for kind in (Runner, FlexibleRunner):
        config = toy_config(tmp_path / kind.__name__, optim_wrapper=copy.deepcopy(wrapper), log_level='ERROR')
        runner = kind(**{**config, 'model': make()})
        runner.train()
        models.append(runner.model)
    assert same_state(*models)


def test_the_tools_build_what_runner_type_names(tmp_path: Path) -> None:
    config = Config(toy_config(tmp_path, log_level='ERROR', launcher='none', env_cfg={}))
    assert type(build_runner(copy.deepcopy(config))) is Runner
    config.runner_type = 'FlexibleRunner'
    config.experiment_name = 'flexible-by-config'
    assert type(build_runner(config)) is FlexibleRunner


def test_on_the_cpu_strategies_stay_off_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Config] = []
    monkeypatch.setattr('mm_sharp.cli.process.RUNNERS.build', built.append)
    monkeypatch.setattr('mm_sharp.cli.process.get_device', lambda: 'cpu')
    strategy = dict(type='FSDPStrategy', model_wrapper=dict(use_orig_params=False))
    build_runner(Config(toy_config(tmp_path, runner_type='FlexibleRunner', strategy=strategy)))
    assert built[0].strategy.model_wrapper == dict(
        type='MMFullyShardedDataParallel', device_id='cpu', use_orig_params=False
    )
    assert built[0].env_cfg.dist_cfg.backend == 'gloo'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(runner_type='FlexibelRunner'), "runner_type='FlexibelRunner' is not registered: write runner_type="),
        (dict(strategy=dict(type='FSDPStrategy')), "write runner_type = 'FlexibleRunner'"),
        (dict(load_from='.'), "is a folder of parts, saved under FSDP: .*state_dict_cfg='full'"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_runner(Config(toy_config(tmp_path, **changes)))


def test_a_folder_of_parts_is_complete_with_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'epoch_1.pth'
    folder.mkdir()
    torch.save({}, folder / 'rank0.pth')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UsageError, match='is cut off'):
        check_checkpoint(str(folder), '--resume')
    assert last_checkpoint(str(tmp_path)) is None
    torch.save({}, folder / 'rank1.pth')
    check_checkpoint(str(folder), '--resume')
    assert last_checkpoint(str(tmp_path)) == str(folder)


def test_parts_of_other_processes_are_refused() -> None:
    part = {TAG: 'ShardedTensor', 'size': [4], 'processes': 2, 'pieces': [torch.ones(2)], 'offsets': [[0]]}
    with pytest.raises(ValueError, match=r"saved by 2 processes under FSDP.*by 1: start as many, .*'full'"):
        from_plain({'weight': part})
