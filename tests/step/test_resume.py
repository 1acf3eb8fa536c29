"""A training run that is killed and resumed ends with the weights of one that never stopped."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from tests.checkpoints import assert_same_history, final_state
from tests.conftest import ROOT
from tests.toys import same_bits, toy_config

EPOCHS, ITERATIONS = 6, 5
SGD = dict(type='SGD', lr=0.01, momentum=0.9)
AUSAM = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.5, reweight=True, history_momentum=0.7, optimizer=SGD)
LOADER = dict(num_workers=2, persistent_workers=True, batch_sampler=dict(type='AUSAMSampler'))
# Checkpoints in the middle of an epoch, whose 5 iterations 3 does not divide.
BY_ITERATION = dict(
    train_cfg=dict(by_epoch=False, max_iters=EPOCHS * ITERATIONS),
    default_hooks=dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False, max_keep_ckpts=2),
    ),
    log_processor=dict(by_epoch=False),
)
CASES: dict[str, dict[str, Any]] = {
    'sam': {},
    'asam, dropout, float16, accumulation': dict(
        model=dict(type='ToyNet', dropout=0.3),
        optim_wrapper=dict(
            type='SAMOptimWrapper',
            rho=0.5,
            adaptive=True,
            dtype='float16',
            loss_scale=dict(init_scale=256.0, growth_interval=4),
            accumulative_counts=5,
            optimizer=dict(type='AdamW', lr=1e-3),
        ),
    ),
    'esam by history': dict(optim_wrapper=dict(type='ESAMOptimWrapper', selection='history', refresh=3, optimizer=SGD)),
    'ausam, dropout, in mid-epoch': dict(model=dict(type='ToyNet', dropout=0.3), optim_wrapper=AUSAM, **BY_ITERATION),
    'ausam, sampler in a loader with workers': dict(optim_wrapper=AUSAM, loader=LOADER),
    'ausam, sampler in a loader with workers, in mid-epoch': dict(optim_wrapper=AUSAM, loader=LOADER, **BY_ITERATION),
}


def write_config(path: Path, case: str, held: bool = False) -> Path:
    """A config of :data:`CASES` as a file; with ``held``, the run never comes to its end."""
    config = toy_config(
        path.parent / 'unused',
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        custom_imports=dict(imports=['mm_sharp', 'tests.toys', 'tests.fault_toys']),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
        ),
        log_level='INFO',
    )
    config.update(copy.deepcopy(CASES[case]))
    config['train_dataloader'].update(config.pop('loader', {}))
    if held:  # before its last iteration, however fast the machine is
        config['custom_hooks'].append(dict(type='HoldHook', at=EPOCHS * ITERATIONS - 1))
    if not config['train_cfg']['by_epoch']:
        config['train_dataloader']['sampler'] = dict(type='InfiniteSampler', shuffle=True)
    del config['work_dir'], config['experiment_name']
    Config(config).dump(str(path))
    return path


def start(config: Path, work_dir: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, '-W', 'ignore', 'tools/train.py', str(config), '--work-dir', str(work_dir), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_after(process: subprocess.Popen[str], lines: int) -> None:
    """SIGKILL once ``lines`` training iterations have been logged."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += '(train)' in line
        if seen == lines:
            break
    # Somewhere within the next iterations, or the writing of a checkpoint.
    time.sleep(random.Random(lines).random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# The others with the kills: each takes ten seconds.
SLOW = ('asam, dropout, float16, accumulation', 'ausam, sampler in a loader with workers, in mid-epoch')


@pytest.mark.parametrize(
    'case', [pytest.param(c, marks=pytest.mark.slow if c in SLOW else pytest.mark.kills) for c in CASES]
)
def test_killed_and_resumed_equals_never_stopped(tmp_path: Path, case: str) -> None:
    config = write_config(tmp_path / 'config.py', case)
    straight = start(config, tmp_path / 'straight')
    killed = start(write_config(tmp_path / 'held.py', case, held=True), tmp_path / 'killed')
    # After the first checkpoint.
    kill_after(killed, random.SystemRandom().randint(ITERATIONS + 2, (EPOCHS - 2) * ITERATIONS))
    saved = {path.stem for path in (tmp_path / 'killed').glob('*.pth')}
    assert saved, 'killed before the first checkpoint'
    assert not saved & {f'epoch_{EPOCHS}', f'iter_{EPOCHS * ITERATIONS}'}
    output = finish(start(config, tmp_path / 'killed', '--resume'))
    assert 'resumed' in output
    finish(straight)
    left, right = final_state(tmp_path / 'straight'), final_state(tmp_path / 'killed')
    assert all(same_bits(left['state_dict'][key], right['state_dict'][key]) for key in left['state_dict'])
    assert len(left['optimizer']['state']) == 6
    for index, state in left['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right['optimizer']['state'][index][name]))
    assert left['optimizer'].get('loss_scaler') == right['optimizer'].get('loss_scaler')
    assert left['meta']['iter'] == right['meta']['iter'] == EPOCHS * ITERATIONS
    own = [s['optimizer']['mm_sharp'] for s in (left, right)]
    assert own[0].get('steps') == own[1].get('steps')
    assert_same_history(*(state.get('history', {}).get('data_sets', {}) for state in own))
    assert torch.equal(*(state['random_state']['cpu'] for state in own))
