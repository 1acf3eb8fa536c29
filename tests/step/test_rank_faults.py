"""One of several processes dies, raises or hangs: the others end too, in bounded time, and what was saved is whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from mm_sharp.cli import process
from tests.processes import Run
from tests.reliability import Holds
from tests.tool_runs import configure, write_toy

SECTION = 'Ranks'
TIMEOUT = 15  # seconds, in which a process can start beside others on a core, too
kills = pytest.mark.kills


in_proc = pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='finds processes in /proc')


def write_config(path: Path, fault: str = 'none') -> Path:
    return write_toy(
        path,
        'ausam',
        custom_imports=dict(imports=['mm_sharp', 'tests.toys', 'tests.toy_metric', 'tests.fault_toys']),
        train_cfg=dict(by_epoch=True, max_epochs=50 if fault != 'none' else 2000),
        custom_hooks=[dict(type='FaultHook', fault=fault, at=7)] if fault != 'none' else [],  # of 3 an epoch
        env_cfg=dict(dist_cfg=dict(timeout=TIMEOUT)),
        log_level='INFO',
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
        ),
    )


@in_proc
@pytest.mark.parametrize(
    'fault',
    [
        pytest.param('hangs', marks=pytest.mark.slow),
        *(pytest.param(fault, marks=kills) for fault in ('dies', 'raises')),
    ],
)
def test_the_others_end_too(tmp_path: Path, fault: str, holds: Holds) -> None:
    config = write_config(tmp_path / 'config.py', fault)
    run = Run(config, tmp_path / 'work', processes=2)
    assert run.wait_until(lambda: run.steps >= 1), run.output[-3000:]
    workers = run.workers()
    assert len(workers) == 2
    code = run.end()  # bounded, and far below torch's own 30 minutes
    assert code not in (0, None), run.output[-3000:]
    assert run.are_gone(workers), 'a process is left'
    if fault == 'hangs':
        assert 'imed out' in run.output
    if fault == 'raises':
        assert 'what went wrong on rank 1' in run.output
    (file,) = (tmp_path / 'work').glob('*.pth')
    assert torch.load(file, weights_only=True)['meta']['iter'] == 6
    assert (tmp_path / 'work' / 'last_checkpoint').read_text() == str(file)
    holds(SECTION, f'a rank {fault}', 'ausam, 2 processes', 'all end with an error in bounded time, checkpoint whole')


@kills
@in_proc
def test_processes_end_with_their_launcher(tmp_path: Path, holds: Holds) -> None:
    run = Run(write_config(tmp_path / 'config.py'), tmp_path / 'work', processes=2)
    assert run.wait_until(lambda: run.steps >= 7), run.output[-3000:]
    workers = run.workers()
    assert len(workers) == 2
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert run.are_gone(workers), 'a process is left'
    holds(SECTION, 'torchrun is killed', 'ausam, 2 processes', 'its processes end too')


@pytest.mark.parametrize('gone_after', [0, 2])
def test_a_process_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch, gone_after: int) -> None:
    parents, sent = iter([17] * gone_after + [1]), []
    monkeypatch.setattr('os.getppid', lambda: next(parents))
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    monkeypatch.setattr('os.kill', lambda *args: sent.append(args))
    process._watch(17)
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize('timeout', [0, -1, 'long', True])
def test_a_wrong_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: object) -> None:
    config = write_toy(tmp_path / 'config.py', env_cfg=dict(dist_cfg=dict(timeout=timeout)))
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr('mm_sharp.cli.options.get_device', lambda: 'cpu')
    with pytest.raises(Exception, match=r'env_cfg\.dist_cfg\.timeout=.*dict\(timeout=1800\)'):
        configure('train', config, '--launcher', 'pytorch')
