"""Makes the runs of a study that are missing, several at a time (ours)."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from mm_sharp.analysis.study.corruption import corrupt_file
from mm_sharp.analysis.study.execute import execute, prepare_process
from mm_sharp.analysis.study.metric_check import check_metric
from mm_sharp.analysis.study.plan import Plan, Run, order_by_need, pools
from mm_sharp.analysis.study.progress import Board, Note, note_down, watch
from mm_sharp.analysis.study.results import choose_rho
from mm_sharp.analysis.study.rows import Rows
from mm_sharp.analysis.study.spec import Setting
from mm_sharp.errors import UsageError


@dataclass(frozen=True)
class Workers:
    """The processes that make the runs.

    Args:
        jobs: How many; each makes one run at a time.
        threads: Of torch in each.
        niceness: Added to theirs.
    """

    jobs: int = 1
    threads: int = 1
    niceness: int = 0


@dataclass(frozen=True)
class Part:
    """A part of the study whose progress is shown.

    Args:
        title: Of it.
        total: Its runs, with those that have been made before.
        board: Says how far those under way are.
    """

    title: str
    total: int
    board: Board


def run_missing(plan: Plan, rows: Rows, workers: Workers, *, redo: bool = False) -> dict[str, dict[str, float | None]]:
    """Make all runs that are missing: those that choose rho first, then those that are reported.

    Args:
        plan: The study.
        rows: The runs made so far; new ones are added.
        workers: That make them.
        redo: Make runs whose config has changed again.

    Returns:
        The rho of each method (None for the base optimizer) by setting.

    Raises:
        UsageError: A run failed, or was made with another config before, or the study's metric is none of the figures.
    """
    chosen: dict[str, dict[str, float | None]] = {}
    for setting in plan.study.settings.values():
        if setting.corrupt and not plan.corrupted(setting).is_file():
            corrupt_file(plan.annotations(setting), plan.corrupted(setting), setting.corrupt)
    board = Board(workers.jobs)
    with _pool(workers, board) as pool:
        check_metric(plan, rows, pool)
        for wave in order_by_need(plan.study.settings.values()):
            runs = [run for setting in wave for run in plan.selection_runs(setting.name)]
            _make(plan, rows, _missing(plan, rows, runs, redo), pool, Part('choosing rho', len(runs), board))
            chosen |= chosen_in(plan, rows, wave)
            runs = [run for setting in wave for run in plan.report_runs(setting.name, chosen[setting.name])]
            _make(plan, rows, _missing(plan, rows, runs, redo), pool, Part('runs to report', len(runs), board))
    return chosen


def chosen_in(plan: Plan, rows: Rows, wave: Sequence[Setting]) -> dict[str, dict[str, float | None]]:
    """The rho of each method by setting, of settings whose selection runs have been made."""
    chosen: dict[str, dict[str, float | None]] = {}
    for names in pools(wave):
        chosen |= dict.fromkeys(names, choose_rho(plan, rows, names))
    return chosen


def make_run(plan: Plan, run: Run, number: int = 1) -> dict[str, float]:
    """One run, in a worker process; returns its figures.

    Args:
        plan: The study.
        run: What is trained.
        number: That its progress is noted under.
    """
    try:
        return execute(plan.config(run), plan.weights(run) if plan.keeps_weights(run) else None, number)
    finally:
        note_down(Note())


def _missing(plan: Plan, rows: Rows, runs: Sequence[Run], redo: bool) -> dict[Run, str]:
    """Those of some runs that are to be made, and the fingerprints of their configs."""
    configs = {run: plan.fingerprint(run) for run in runs}
    old = [run.id for run, config in configs.items() if rows.outdated(run, config)]
    if old and not redo:
        raise UsageError(
            f'{len(old)} runs in {rows.file} were made with other configs, {old[0]} among them: make them again with '
            '--redo, or give another --out-dir'
        )
    return {run: config for run, config in configs.items() if not _is_there(plan, rows, run, config)}


def _make(plan: Plan, rows: Rows, missing: dict[Run, str], pool: ProcessPoolExecutor, part: Part) -> None:
    """Make the missing runs."""
    futures = {pool.submit(make_run, plan, run, number): run for number, run in enumerate(missing, 1)}
    names = {future: run.id for future, run in futures.items()}
    errors: list[tuple[Run, BaseException, str]] = []
    for future in watch(part.title, names, total=part.total, board=part.board):
        run = futures[future]
        error = future.exception()
        if error is None:
            rows.add(run, missing[run], future.result())
            rows.value(run, plan.study.metric.name)  # what is missing now will be missing after all other runs
            continue
        errors.append((run, error, f'{type(error).__name__}: {" ".join(str(error).split())}'))
        if len(errors) == 1 and len(missing) > 1:
            tqdm.write(f'{run.id} failed: {errors[0][2]}; the others go on', sys.stderr)
    if errors:
        run, error, reason = errors[0]
        raise UsageError(
            f'{len(errors)} of {len(missing)} runs failed; {run.id}: {reason} (--debug shows where). The others are in '
            f'{rows.file}; the same command goes on'
        ) from error


def _is_there(plan: Plan, rows: Rows, run: Run, config: str) -> bool:
    return rows.has(run, config) and (not plan.keeps_weights(run) or plan.weights(run).is_file())


@contextmanager
def _pool(workers: Workers, board: Board | None = None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, which do not outlive the context whatever ends it."""
    # A fork would copy the threads' locks of torch, without the threads.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(
        workers.jobs, context, initializer=prepare_process, initargs=(workers.threads, workers.niceness, board)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
