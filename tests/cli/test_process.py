"""How the tools end that do not come to their end: Ctrl-C, SIGTERM, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from mmengine.config import Config

from mm_sharp.cli import options as cli
from mm_sharp.cli.process import StoppedError, ending, say_how_to_go_on
from mm_sharp.compat import CheckpointWriteError
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.processes import Run
from tests.reliability import Holds
from tests.tool_runs import write_toy

IMPORTS = dict(imports=['mm_sharp', 'tests.toys', 'tests.toy_metric', 'tests.fault_toys'])


@pytest.mark.parametrize(
    'number',
    [pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.kills)],
)
def test_signals(tmp_path: Path, number: signal.Signals, holds: Holds) -> None:
    config = write_toy(
        tmp_path / 'config.py',
        custom_imports=IMPORTS,
        train_cfg=dict(by_epoch=True, max_epochs=500),
        custom_hooks=[dict(type='PauseHook', seconds=0.02)],
    )
    run = Run(config, tmp_path / 'work')
    assert run.wait_until(lambda: (tmp_path / 'work' / 'last_checkpoint').exists()), run.output
    run.send(number)
    code = run.end()
    if number is signal.SIGINT:
        assert code == 130
        assert 'Traceback' not in run.output
        last = run.output.splitlines()[-1]
        assert last.startswith('train.py: interrupted; go on from ')
        assert last.endswith('.pth with --resume')
    else:
        assert code == -signal.SIGTERM
    held = 'ends in one line that says how to go on, code 130' if number is signal.SIGINT else 'ends at once'
    holds('Kills', number.name, 'tools/train.py', held)


def test_interrupted_before_the_first_checkpoint() -> None:
    with pytest.raises(StoppedError, match=r'^interrupted; there is no checkpoint yet$') as caught:  # noqa: SIM117
        with say_how_to_go_on(lambda: None):
            raise KeyboardInterrupt
    assert caught.value.code == 130


def test_what_libraries_make_of_an_interruption_is_one() -> None:
    """MMEngine's Config formats its text, which every checkpoint holds, under a bare ``except``."""

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    config = Config(dict(a=1))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError, match='interrupted; go on from'):  # noqa: PT012
        patch.setattr('mmengine.config.config.FormatCode', interrupted)
        with say_how_to_go_on(lambda: 'a.pth'):
            config.pretty_text  # noqa: B018


@pytest.mark.parametrize(
    ('error', 'code', 'line'),
    [
        (KeyboardInterrupt(), 130, 'interrupted'),
        (
            OSError(errno.ENOSPC, 'No space left on device', 'log.json'),
            1,
            "error: cannot write 'log.json': No space left",
        ),
        (OSError(errno.ENOSPC, 'No space left on device'), 1, 'error: cannot write: No space left'),
        (
            CheckpointWriteError(errno.EACCES, 'Permission denied', 'a.pth'),
            1,
            "error: cannot write 'a.pth': Permission",
        ),
        (StoppedError('that was it', 3), 3, 'that was it'),
        (UsageError('wrong'), 2, 'error: wrong'),
    ],
)
def test_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def tool(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    assert cli.run_tool(tool) == code
    printed = capsys.readouterr().err
    assert printed.startswith(f'train.py: {line}')
    assert len(printed.splitlines()) == 1
    monkeypatch.setattr(sys, 'argv', ['tools/train.py', '--debug'])
    with pytest.raises(type(error)):
        cli.run_tool(tool)


@pytest.mark.parametrize('error', [OSError(errno.ENOENT, 'No such file', 'x'), RuntimeError('a bug')])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def tool(arguments: Sequence[str]) -> None:
        with say_how_to_go_on(lambda: None):
            raise error

    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    assert ending(error) is None
    with pytest.raises(type(error)):
        cli.run_tool(tool)


@pytest.mark.kills
def test_workers_of_a_study_end_with_it(tmp_path: Path) -> None:
    """Killed as where memory is short: nothing is left to tell its workers."""
    script = tmp_path / 'study.py'
    script.write_text(
        'import os, time\n'
        'from mm_sharp.analysis.study.run_missing import _pool\n'
        'if __name__ == "__main__":\n'
        '    with _pool() as pool:\n'
        '        print(pool.submit(os.getpid).result(), flush=True)\n'
        '        time.sleep(600)\n'
    )
    with subprocess.Popen([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        os.kill(worker, 0)  # it is there
        study.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    pytest.fail('the worker goes on')
