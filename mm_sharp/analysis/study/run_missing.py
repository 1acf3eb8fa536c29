"""Makes the runs of a study that are missing, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mm_sharp.analysis.study.corruption import corrupt_file
from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.progress import watch
from mm_sharp.analysis.study.results import Rows, choose_rho, timed_runs
from mm_sharp.analysis.study.worker import make_run, prepare_process
from mm_sharp.errors import UsageError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process makes runs in ``folder``: two would write over each other's rows.

    The file ``.lock`` says which. Where there are no locks (Windows, some network drives), a line says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.lock').open('a+') as stream:
        try:
            import fcntl  # only here: Windows has none

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise UsageError(
                f"{stream.read() or 'another process'} makes runs in '{folder}': wait for it or stop it, give another "
                '--out-dir, or see with --table what is there'
            ) from error
        except (ImportError, OSError) as error:
            sys.stderr.write(f"'{folder}' cannot be locked ({error}): start no second study in it\n")
        stream.truncate(0)
        stream.write(f'process {os.getpid()} on {socket.gethostname()}')
        stream.flush()
        yield


def run_missing(
    plan: Plan, rows: Rows, *, jobs: int = 1, threads: int = 1, niceness: int = 0, redo: bool = False
) -> None:
    """Make all runs that are missing, in some processes: those that choose rho first, then those that are reported.

    A UsageError: one failed, or was made with another config before, or the evaluators do not give the metric.
    """
    for setting in plan.study.settings.values():
        if setting.corrupt and not plan.corrupted(setting).is_file():
            corrupt_file(plan.annotations(setting), plan.corrupted(setting), setting.corrupt)
    with _pool(jobs, threads, niceness) as pool:
        for wave in plan.waves():
            runs = [run for names in wave for name in names for run in plan.selection_runs(name)]
            _make('choosing rho', runs, plan, rows, pool, redo)
            pools = [(names, choose_rho(plan, rows, names)) for names in wave]
            runs = [run for names, chosen in pools for name in names for run in plan.report_runs(name, chosen)]
            _make('runs to report', runs, plan, rows, pool, redo)
            runs = [run for names, chosen in pools for name in names for run in timed_runs(plan, rows, name, chosen)]
            _make('runs at equal time', runs, plan, rows, pool, redo)


def _make(title: str, runs: Sequence[Run], plan: Plan, rows: Rows, pool: Executor, redo: bool) -> None:
    missing = _missing(runs, plan, rows, redo)
    errors: list[tuple[Run, BaseException]] = []
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        notes = {run: Path(folder, f'{number}.json') for number, run in enumerate(missing)}
        futures = {pool.submit(make_run, plan, run, note): run for run, note in notes.items()}
        for future in watch(title, {future: (run.id, notes[run]) for future, run in futures.items()}, len(runs)):
            run = futures[future]
            if (error := future.exception()) is None:
                rows.add(run, missing[run], future.result())
                rows.value(run, plan.study.metric.name)  # what is missing now will be missing after all other runs
                continue
            errors.append((run, error))
            if len(errors) == 1 and len(missing) > 1:
                sys.stderr.write(f'{run.id} failed: {_one_line(error)}; the others go on\n')
    if errors:
        run, error = errors[0]
        raise UsageError(
            f'{len(errors)} of {len(missing)} runs failed; {run.id}: {_one_line(error)} (--debug shows where). The '
            f'others are in {rows.file}; the same command goes on'
        ) from error


def _missing(runs: Sequence[Run], plan: Plan, rows: Rows, redo: bool) -> dict[Run, str]:
    configs = {run: plan.fingerprint(run) for run in runs}
    old = [run.id for run, config in configs.items() if rows.config(run) not in (None, config)]
    if old and not redo:
        hint = f'{old[0]} among them: make them again with --redo, or give another --out-dir'
        raise UsageError(f'{len(old)} runs in {rows.file} were made with other configs, {hint}')
    lost = {run for run in runs if plan.keeps_weights(run) and not plan.weights(run).is_file()}
    return {run: config for run, config in configs.items() if run in lost or rows.config(run) != config}


def _one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


@contextmanager
def _pool(jobs: int = 1, threads: int = 1, niceness: int = 0) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context('spawn')  # a fork would copy the locks of torch's threads without the threads
    pool = ProcessPoolExecutor(jobs, context, prepare_process, (threads, niceness))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
