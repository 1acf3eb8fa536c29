"""Training by tools/dist_train.sh over gloo: all ranks hold the same weights after every step, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from tests.conftest import ROOT
from tests.distributed import free_port
from tests.reliability import Holds
from tests.toys import toy_config

SGD = dict(type='SGD', lr=0.01, momentum=0.9)
EPOCHS = 3
METHODS: dict[str, dict[str, Any]] = {
    'sam': dict(type='SAMOptimWrapper', optimizer=SGD, accumulative_counts=2, clip_grad=dict(max_norm=1.0)),
    'esam': dict(type='ESAMOptimWrapper', optimizer=SGD),
    'ausam': dict(type='AUSAMOptimWrapper', optimizer=SGD, accumulative_counts=2, dtype='bfloat16', reweight=True),
}
# The last batches of an epoch: 22 samples are 11 + 11, or 6 + 6 + 5 + 5, in batches of 4.
LAST = {2: [3, 3], 4: [2, 2, 1, 1]}
RUNS = [
    *(pytest.param(name, processes, marks=pytest.mark.slow) for name, processes in (('ausam', 2), ('esam', 4))),
    *(pytest.param(name, processes, marks=pytest.mark.thorough) for name, processes in
      (('sam', 2), ('esam', 2), ('sam', 4), ('ausam', 4))),
]  # fmt: skip


def write_config(path: Path, name: str) -> Path:
    """A run with all that goes wrong easily on several ranks."""
    config = toy_config(
        path.parent / 'unused',
        model=dict(type='SyncedNet', unused=True, dropout=0.2),
        custom_imports=dict(imports=['mm_sharp', 'tests.toys', 'tests.rank_toys']),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        optim_wrapper=METHODS[name],
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel',
            find_unused_parameters=True,
            broadcast_buffers=True,
            detect_anomalous_params=name == 'sam',
        ),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), dict(type='SharpnessHook'), dict(type='WeightHashHook')],
        log_level='INFO',
    )
    config['train_dataloader']['dataset']['count'] = 22
    config['train_dataloader']['sampler']['round_up'] = False
    del config['work_dir'], config['experiment_name']
    Config(config).dump(str(path))
    return path


@pytest.mark.parametrize(('name', 'processes'), RUNS)
def test_ranks_stay_equal(tmp_path: Path, name: str, processes: int, holds: Holds) -> None:
    config = write_config(tmp_path / 'config.py', name)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PORT': str(free_port())}
    environment.update(PYTHON=sys.executable, PYTHONWARNINGS='ignore')
    done = subprocess.run(
        ['tools/dist_train.sh', config, str(processes), '--work-dir', tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [(tmp_path / f'weights.{rank}').read_text().splitlines() for rank in range(processes)]
    sizes = [[int(line.split()[0]) for line in rank] for rank in lines]
    per_epoch = len(sizes[0]) // EPOCHS
    assert [rank[per_epoch - 1] for rank in sizes] == LAST[processes], 'the last batches are not uneven'
    weights = [[line.split()[1:] for line in rank] for rank in lines]
    assert all(rank == weights[0] for rank in weights)
    # The weights change in every step, and so do their averages.
    steps = len(weights[0]) // (METHODS[name].get('accumulative_counts', 1))
    assert len({line[0] for line in weights[0]}) >= steps
    assert all(len(line) == 2 for line in weights[0])
    state = torch.load(tmp_path / f'epoch_{EPOCHS}.pth', weights_only=True)
    assert all(value.isfinite().all() for value in state['state_dict'].values())
    what = 'uneven last batches, synchronised BatchNorm, unused parameters, EMA'
    held = f'the same weights on {processes} ranks'
    holds('Ranks', what, name, held, count=len(weights[0]) * processes, unit='weights compared by hash (steps × ranks)')


def test_slurm_train_hands_everything_to_srun(tmp_path: Path) -> None:
    (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': 'my-python'}
    environment.update(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3', SRUN_ARGS='--quotatype=auto --exclusive')
    command = [
        'tools/slurm_train.sh',
        'gpu',
        'pose',
        'my config.py',
        'my work',
        '--resume',
        '--cfg-options',
        'a.b=[1,2]',
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        '-p', 'gpu', '--job-name=pose', '--gres=gpu:4', '--ntasks=16', '--ntasks-per-node=4', '--cpus-per-task=3',
        '--kill-on-bad-exit=1', '--quotatype=auto', '--exclusive', 'my-python', '-u', 'tools/train.py', 'my config.py',
        '--work-dir', 'my work', '--launcher', 'slurm', '--resume', '--cfg-options', 'a.b=[1,2]',
    ]  # fmt: skip


def test_slurm_train_without_its_arguments() -> None:
    done = subprocess.run(['tools/slurm_train.sh', 'gpu'], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR')
