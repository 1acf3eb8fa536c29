"""A training run that is killed and resumed ends with the weights of one that never stopped."""

from __future__ import annotations

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

from tests.conftest import ROOT
from tests.toys import same_bits, toy_config

EPOCHS, ITERATIONS = 6, 5
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
}


def write_config(path: Path, case: str) -> Path:
    """A config of :data:`CASES` as a file."""
    config = toy_config(
        path.parent / 'unused',
        **CASES[case],
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        custom_imports=dict(imports=['mm_sharp', 'tests.toys']),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
        ),
        log_level='INFO',
    )
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
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_after(process: subprocess.Popen[str], lines: int) -> None:
    """SIGKILL once ``lines`` training iterations have been logged."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += 'Epoch(train)' in line
        if seen == lines:
            break
    # Somewhere within the next iterations, or the writing of a checkpoint.
    time.sleep(random.Random(lines).random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, 'the run ended before it could be killed'


def final_state(work_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(work_dir / f'epoch_{EPOCHS}.pth', weights_only=True)
    return state


@pytest.mark.parametrize('case', CASES)
def test_killed_and_resumed_equals_never_stopped(tmp_path: Path, case: str) -> None:
    config = write_config(tmp_path / 'config.py', case)
    straight = start(config, tmp_path / 'straight')
    killed = start(config, tmp_path / 'killed')
    # After the first checkpoint, and early enough that the run is still going when the signal arrives.
    kill_after(killed, random.SystemRandom().randint(ITERATIONS + 2, (EPOCHS - 2) * ITERATIONS))
    saved = sorted(path.name for path in (tmp_path / 'killed').glob('epoch_*.pth'))
    assert saved, 'killed before the first checkpoint'
    assert f'epoch_{EPOCHS}.pth' not in saved
    output = finish(start(config, tmp_path / 'killed', '--resume'))
    assert 'resumed' in output
    finish(straight)
    left, right = final_state(tmp_path / 'straight'), final_state(tmp_path / 'killed')
    assert all(same_bits(left['state_dict'][key], right['state_dict'][key]) for key in left['state_dict'])
    for index, state in left['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right['optimizer']['state'][index][name]))
    assert left['optimizer'].get('loss_scaler') == right['optimizer'].get('loss_scaler')
    assert torch.equal(*(s['optimizer']['mm_sharp']['random_state']['cpu'] for s in (left, right)))
