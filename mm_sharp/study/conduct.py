"""Makes the runs of a study that are missing, several at a time (ours)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from mm_sharp.cli import UsageError
from mm_sharp.study.corruption import corrupt_file
from mm_sharp.study.execute import execute, prepare_process
from mm_sharp.study.metric_check import check_metric
from mm_sharp.study.plan import Plan, Run, order_by_need, pools
from mm_sharp.study.results import choose_rho
from mm_sharp.study.rows import Rows
from mm_sharp.study.spec import Setting


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


def conduct(plan: Plan, rows: Rows, workers: Workers, *, redo: bool = False) -> dict[str, dict[str, float | None]]:
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
    with _pool(workers) as pool:
        check_metric(plan, rows, pool)
        for wave in order_by_need(plan.study.settings.values()):
            _make(plan, rows, [run for s in wave for run in plan.selection_runs(s.name)], pool, 'choosing rho', redo)
            chosen |= chosen_in(plan, rows, wave)
            runs = [run for setting in wave for run in plan.report_runs(setting.name, chosen[setting.name])]
            _make(plan, rows, runs, pool, 'runs to report', redo)
    return chosen


def chosen_in(plan: Plan, rows: Rows, wave: Sequence[Setting]) -> dict[str, dict[str, float | None]]:
    """The rho of each method by setting, of settings whose selection runs have been made."""
    chosen: dict[str, dict[str, float | None]] = {}
    for names in pools(wave):
        chosen |= dict.fromkeys(names, choose_rho(plan, rows, names))
    return chosen


def make_run(plan: Plan, run: Run) -> dict[str, float]:
    """One run, in a worker process; returns its figures."""
    return execute(plan.config(run), plan.weights(run) if plan.keeps_weights(run) else None)


def _make(plan: Plan, rows: Rows, runs: Sequence[Run], pool: ProcessPoolExecutor, title: str, redo: bool) -> None:
    """Make the missing ones of some runs."""
    configs = {run: plan.fingerprint(run) for run in dict.fromkeys(runs)}
    old = [run.id for run, config in configs.items() if rows.outdated(run, config)]
    if old and not redo:
        raise UsageError(
            f'{len(old)} runs in {rows.file} were made with other configs, {old[0]} among them: make them again with '
            '--redo, or give another --out-dir'
        )
    missing = [run for run, config in configs.items() if not _is_there(plan, rows, run, config)]
    futures: dict[Future[dict[str, float]], Run] = {pool.submit(make_run, plan, run): run for run in missing}
    errors: list[tuple[Run, BaseException]] = []
    done = len(configs) - len(missing)
    for future in tqdm(as_completed(futures), title, len(configs), initial=done, unit='run', disable=not missing):
        run = futures[future]
        error = future.exception()
        if error is None:
            rows.add(run, configs[run], future.result())
            rows.value(run, plan.study.metric.name)  # what is missing now will be missing after all other runs
        else:
            errors.append((run, error))
    if errors:
        run, error = errors[0]
        reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
        raise UsageError(
            f'{len(errors)} of {len(missing)} runs failed; {run.id}: {reason} (--debug shows where). The others are in '
            f'{rows.file}; the same command goes on'
        ) from error


def _is_there(plan: Plan, rows: Rows, run: Run, config: str) -> bool:
    return rows.has(run, config) and (not plan.keeps_weights(run) or plan.weights(run).is_file())


@contextmanager
def _pool(workers: Workers) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, which do not outlive the context whatever ends it."""
    # A fork would copy the threads' locks of torch, without the threads.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(
        workers.jobs, context, initializer=prepare_process, initargs=(workers.threads, workers.niceness)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
