"""Training runs in processes of their own, through tools/train.py or tools/dist_train.sh, and their signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT
from tests.distributed import free_port


def _obey_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """A run of ``tools/train.py`` that has been started.

    Args:
        config: The config file.
        work_dir: Of the run.
        options: More of the tool's.
        processes: With more than one, ``tools/dist_train.sh`` starts them.
    """

    def __init__(self, config: Path, work_dir: Path, *options: str, processes: int = 1) -> None:
        self.work_dir, self.processes = work_dir, processes
        work_dir.mkdir(parents=True, exist_ok=True)
        self._log = work_dir.parent / f'{work_dir.name}.out'
        environment = {
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'OMP_NUM_THREADS': '1',
            'PYTHONUNBUFFERED': '1',
            'PYTHONWARNINGS': 'ignore',
            'PYTHON': sys.executable,
            'PORT': str(free_port()),
        }
        start = [sys.executable, 'tools/train.py', str(config)]
        if processes > 1:
            start = ['tools/dist_train.sh', str(config), str(processes)]
        with self._log.open('w') as log:
            self._popen = subprocess.Popen(
                [*start, '--work-dir', str(work_dir), *options],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A shell without job control has its background processes, as these tests may be, ignore Ctrl-C.
                preexec_fn=_obey_interrupts,
            )
        self.started = time.monotonic()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors='replace')

    @property
    def steps(self) -> int:
        """Training iterations logged."""
        return self.output.count('(train)')

    def wait_until(self, condition: Callable[[], bool], seconds: float = 600.0) -> bool:
        """Wait for a condition; False if the run ended before it came true."""
        end = time.monotonic() + seconds
        while not condition():
            if self._popen.poll() is not None:
                return False
            assert time.monotonic() < end, self.output[-3000:]
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to the process that was started, or to another of its processes."""
        os.kill(self._popen.pid if pid is None else pid, number)

    def workers(self) -> list[int]:
        """The processes of the run that its launcher has started, whether or not that is still there."""
        found = []
        for command in Path('/proc').glob('[0-9]*/cmdline'):
            try:
                words = command.read_text().split('\0')
            except OSError:  # it has ended
                continue
            if str(self.work_dir) in words and int(command.parent.name) != self._popen.pid:
                found.append(int(command.parent.name))
        return sorted(found)

    @staticmethod
    def are_gone(pids: list[int], seconds: float = 600.0) -> bool:
        """Whether processes have ended; some take a moment."""
        end = time.monotonic() + seconds
        while any(_lives(pid) for pid in pids):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def end(self, seconds: float = 600.0) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        try:
            return self._popen.wait(seconds)
        finally:
            if self._popen.poll() is None:
                for pid in (*self.workers(), self._popen.pid):
                    os.kill(pid, signal.SIGKILL)
                self._popen.wait()


def _lives(pid: int) -> bool:
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return False
    return state not in 'ZX'  # ended, but whoever should take note has not
