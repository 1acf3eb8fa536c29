"""Runs that are killed again and again, at any time, end with the weights of one that never stopped.

Not part of the default suite: ``make test-kills``.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import assert_same_history, final_state
from tests.processes import Run
from tests.reliability import Holds
from tests.tool_runs import write_toy
from tests.toys import same_bits

pytestmark = [
    pytest.mark.kills,
    pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='finds processes in /proc'),
]
SECTION = 'Kills'
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
# When: while the program starts, at any time while it trains, or as soon as a checkpoint is being written.
MOMENTS = ('starting', 'training', 'writing')
EPOCHS = 36


def write_config(path: Path, wrapper: str, processes: int) -> Path:
    """The toy, for long enough to be killed nine times."""
    return write_toy(
        path,
        wrapper,
        # Of several processes' random states a checkpoint holds none: their dropout masks are others after a resume.
        model=dict(type='HeavyNet', dropout=0.3 if processes == 1 else 0.0),
        custom_imports=dict(imports=['mm_sharp', 'tests.toys', 'tests.toy_metric', 'tests.fault_toys']),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
        ),
        custom_hooks=[dict(type='PauseHook', seconds=0.02)],
        env_cfg=dict(dist_cfg=dict(timeout=60)),
        log_level='INFO',
    )


def kill(run: Run, number: signal.Signals, moment: str, chance: random.Random) -> bool:
    """Kill a run; False if it came to its end before."""
    steps = chance.randint(1, 8)  # and no time, in which a fast machine would come to the end
    if moment == 'starting':
        end = time.monotonic() + chance.uniform(0.0, 5.0)
        run.wait_until(lambda: run.steps > 0 or time.monotonic() > end)
    else:
        run.wait_until(lambda: run.steps >= steps)
        time.sleep(chance.uniform(0.0, 0.02))
    if moment == 'writing' and not run.wait_until(lambda: any(run.work_dir.glob('.*.partial'))):
        return False
    workers = run.workers() if run.processes > 1 else []
    try:
        run.send(number, chance.choice([None, *workers]) if moment != 'starting' else None)
    except ProcessLookupError:
        return False
    if moment == 'starting' and number is signal.SIGKILL:  # as when a machine fails: nobody knows of the others yet
        for pid in run.workers():
            run.send(number, pid)
    code = run.end()
    assert run.are_gone(workers), 'a process is left'
    if run.processes == 1 and code != 0:
        assert code in {signal.SIGINT: (130, -2), signal.SIGTERM: (-15,), signal.SIGKILL: (-9,)}[number], run.output
    return code != 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(('wrapper', 'processes'), [('sam', 1), ('esam-history', 1), ('ausam', 2)])
def test_killed_again_and_again(tmp_path: Path, wrapper: str, processes: int, holds: Holds) -> None:
    config = write_config(tmp_path / 'config.py', wrapper, processes)
    seed = random.SystemRandom().randrange(2**32)
    sys.stdout.write(f'{wrapper}, {processes} process(es), seed {seed}\n')
    chance = random.Random(seed)
    straight = Run(config, tmp_path / 'straight', processes=processes)
    assert straight.end() == 0, straight.output[-3000:]
    plan = [(number, moment) for number in SIGNALS for moment in MOMENTS]
    chance.shuffle(plan)
    survived: Counter[str] = Counter()
    for number, moment in plan:
        run = Run(config, tmp_path / 'killed', '--resume', processes=processes)
        assert kill(run, number, moment, chance), 'the run ended before it could be killed: more EPOCHS'
        assert_whole(tmp_path / 'killed')
        survived[f'{number.name}, {moment}'] += 1
        torn = ', a file half written' if any((tmp_path / 'killed').glob('.*.partial')) else ''
        sys.stdout.write(f'  {number.name} while {moment}: after {run.steps} steps of this run{torn}\n')
    last = Run(config, tmp_path / 'killed', '--resume', processes=processes)
    assert last.end() == 0, last.output[-3000:]
    assert_equal(final_state(tmp_path / 'straight'), final_state(tmp_path / 'killed'), processes)
    assert not list((tmp_path / 'killed').glob('.*')), 'left over'
    subject = wrapper if processes == 1 else f'{wrapper}, {processes} processes'
    for number in SIGNALS:
        count = sum(survived[f'{number.name}, {moment}'] for moment in MOMENTS)
        held = 'weights, optimizer state and history as of a run never stopped'
        holds(SECTION, number.name, subject, held, count=count, unit='kills survived')


def assert_whole(work_dir: Path) -> None:
    """Every checkpoint can be read to its end, and what last_checkpoint names is there."""
    for file in work_dir.glob('*.pth'):
        assert torch.load(file, weights_only=True)['meta']['iter'] > 0
    pointer = work_dir / 'last_checkpoint'
    if pointer.exists():
        assert Path(pointer.read_text()).is_file()
        assert len(list(work_dir.glob('*.pth'))) <= 2


def assert_equal(left: dict[str, Any], right: dict[str, Any], processes: int) -> None:
    assert left['meta']['iter'] == right['meta']['iter']
    assert left['state_dict'].keys() == right['state_dict'].keys()
    assert all(same_bits(left['state_dict'][key], right['state_dict'][key]) for key in left['state_dict'])
    assert left['optimizer']['state'].keys() == right['optimizer']['state'].keys()
    for index, state in left['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right['optimizer']['state'][index][name]))
    own = [side['optimizer']['mm_sharp'] for side in (left, right)]
    assert own[0].get('steps') == own[1].get('steps')
    assert_same_history(*(state.get('history', {}).get('data_sets', {}) for state in own))
