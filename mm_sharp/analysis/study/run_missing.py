"""Makes the runs of a study that are missing, several at a time, and shows how far they are.

A process makes many runs: importing MMPose takes longer than training a small model. Each run in flight writes to a
file of its own how far it is.
"""

from __future__ import annotations

import fcntl
import gc
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin, import_modules_from_strings
from tqdm import tqdm

from mm_sharp.analysis.study.corruption import corrupt_file
from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.results import Rows, choose_rho, timed_runs
from mm_sharp.cli.options import output_folder
from mm_sharp.cli.process import build_runner, end_with_parent
from mm_sharp.compat import enable_for_all_runs
from mm_sharp.errors import UsageError
from mm_sharp.hooks.start import missing_samples

_Result = TypeVar('_Result')

_LOOK, _LINE = 1.0, 60.0  # seconds between two looks; and between two lines where they are kept, as in a file


class ProgressHook(Hook):  # type: ignore[misc]
    """Writes to a file how far its run is: the share of its steps, and a text for people."""

    priority = 'VERY_LOW'

    def __init__(self, file: Path) -> None:
        self._file, self._begun, self._written = file, time.time(), 0.0
        self._write(0, 'starting')

    def before_train(self, runner: Any) -> None:
        """Refuse a data set that is smaller than the study says."""
        if message := missing_samples(runner):
            raise UsageError(message)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the step, and the time that is left."""
        now, step, steps = time.time(), runner.iter + 1, runner.max_iters
        if now >= self._written + _LOOK:
            left = (now - self._begun) * (steps - step) / step
            text = f'epoch {runner.epoch + 1} of {runner.max_epochs}, step {step} of {steps}'
            self._write(step / steps, f'{text}, {_clock(now - self._begun)} elapsed, {_clock(left)} left')

    def before_test(self, runner: Any) -> None:
        """Write that all steps are made."""
        self._write(1, 'evaluating')

    def _write(self, share: float, text: str) -> None:
        self._written, draft = time.time(), self._file.with_suffix('.tmp')
        draft.write_text(json.dumps([share, text]))
        draft.replace(self._file)


def watch(title: str, futures: Mapping[Future[_Result], tuple[str, Path]], total: int) -> Iterator[Future[_Result]]:
    """Futures as they end; meanwhile stderr shows how far they are, on a terminal each second, elsewhere each minute.

    Each has a name and the file of its :class:`ProgressHook`; ``total`` is with those that have been made before.
    """
    waiting, form = set(futures), '{desc}: {n:.1f} of {total}, {elapsed} elapsed, {remaining} left{postfix}'
    how: Any = {'mininterval': _LOOK if sys.stderr.isatty() else _LINE, 'disable': not futures, 'dynamic_ncols': True}
    with tqdm(desc=title, total=total, initial=total - len(futures), bar_format=form, **how) as bar:
        while waiting:
            ended, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
            files = {name: file for future, (name, file) in futures.items() if future in waiting and file.exists()}
            in_flight = {name: json.loads(file.read_text()) for name, file in files.items()}
            bar.set_postfix_str('; '.join(f'{name}: {text}' for name, (_, text) in in_flight.items()), refresh=False)
            bar.update(total - len(waiting) + sum(share for share, _ in in_flight.values()) - bar.n)
            yield from (future for future in futures if future in ended)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def prepare_process(threads: int, niceness: int) -> None:
    """Set up a process for runs: torch's threads on the CPU, and what is added to its niceness."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    torch.set_num_threads(threads)
    os.nice(niceness)
    end_with_parent()
    warnings.filterwarnings('ignore')  # what training scripts print once would be printed hundreds of times
    sys.stdout = io.StringIO()
    enable_for_all_runs()


def make_run(plan: Plan, run: Run, progress: Path) -> dict[str, float]:
    """Train, evaluate on the test data, and note in a file how far it is.

    Returns the evaluators' metrics that are numbers; ``train_loss``, the mean of the last 50 steps; ``steps``;
    ``train_seconds`` on the clock; and ``cost_seconds``: on a CPU the seconds that this process had a processor, on a
    GPU those on the clock.
    """
    hook = ProgressHook(progress)
    runner = new_runner(plan.config(run))
    runner.register_hook(hook)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    begin, busy = time.perf_counter(), clock()
    runner.train()
    seconds, cost = time.perf_counter() - begin, clock() - busy
    metrics = runner.test()
    if plan.keeps_weights(run):
        file = plan.weights(run)
        runner.save_checkpoint(str(file.parent), file.name, save_optimizer=False, save_param_scheduler=False)
    loss = runner.message_hub.get_scalar('train/loss').mean(50)
    times = {'train_seconds': seconds, 'cost_seconds': cost}
    return numbers({**metrics, 'train_loss': loss, 'steps': runner.iter, **times})


def new_runner(cfg: Config) -> Any:
    """The runner of a config without validation, in a process that has made other runs."""
    _forget_runs()
    if cfg.get('custom_imports'):  # which MMEngine obeys when it reads a file, in another process
        import_modules_from_strings(**cfg.custom_imports)
    # Six times in a run, MMEngine would have the config's text formatted as code, which takes longer than many epochs.
    cfg = Config(cfg.to_dict(), format_python_code=False)
    cfg.log_level = 'WARNING'
    # A run that is broken off is made again: nothing goes on from a checkpoint.
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': None}
    return build_runner(cfg)


def _forget_runs() -> None:
    """Remove what MMEngine keeps of earlier runs by name, such as loggers and visualizers.

    Runs that begin in the same second share names: one would get the loss of another that failed, or its folder.
    """
    kinds: list[type[ManagerMixin]] = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for logger in (kept for kept in kind._instance_dict.values() if isinstance(kept, MMLogger)):
            for handler in logger.handlers:
                handler.close()
        kind._instance_dict.clear()
    gc.collect()
    gc.freeze()  # the next collection passes over what is imported by now: that would take longer than small runs


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of an evaluation's metrics that are single numbers: some evaluators also give tables."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process makes runs in ``folder``: two would write over each other's rows.

    The file ``.lock`` says which. Where there are no locks (some network drives), a line says so.
    """
    output_folder(folder)
    with (folder / '.lock').open('a+') as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            hint = 'wait for it or stop it, give another --out-dir, or see with --table what is there'
            raise UsageError(f"{stream.read() or 'another process'} makes runs in '{folder}': {hint}") from error
        except OSError as error:
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
        make = partial(_make, plan, rows, pool, redo)
        for wave in plan.waves():
            make('choosing rho', [run for name in chain(*wave) for run in plan.selection_runs(name)])
            chosen: dict[str, dict[str, float | None]] = {}
            for names in wave:
                chosen |= dict.fromkeys(names, choose_rho(plan, rows, names))
            make('runs to report', [run for name, own in chosen.items() for run in plan.report_runs(name, own)])
            timed = [run for name, own in chosen.items() for run in timed_runs(plan, rows, name, own)]
            make('runs at equal time', timed)


def _make(plan: Plan, rows: Rows, pool: Executor, redo: bool, title: str, runs: Sequence[Run]) -> None:
    missing = _missing(runs, plan, rows, redo)
    starts = dict.fromkeys(source for run in missing if (source := plan.source(run)) is not None)
    # Rows can be there without the weights, as those that are published.
    lost = [run for run in starts if not plan.weights(run).is_file()]
    _train(plan, rows, pool, 'runs whose weights are missing', lost, len(lost))
    _train(plan, rows, pool, title, missing, len(runs))


def _train(plan: Plan, rows: Rows, pool: Executor, title: str, missing: Sequence[Run], total: int) -> None:
    """Make runs; ``total`` is with those that have been made before."""
    errors: list[tuple[Run, BaseException]] = []
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        notes = {run: Path(folder, f'{number}.json') for number, run in enumerate(missing)}
        futures = {pool.submit(make_run, plan, run, note): run for run, note in notes.items()}
        for future in watch(title, {future: (run.id, notes[run]) for future, run in futures.items()}, total):
            run = futures[future]
            if (error := future.exception()) is None:
                rows.add(run, plan.fingerprint(run), future.result(), plan.start(run))
                rows.value(run, plan.study.metric.name)  # what is missing now will be missing after all other runs
                continue
            errors.append((run, error))
            if len(errors) == 1 and len(missing) > 1 and not isinstance(error, BrokenExecutor):
                tqdm.write(f'{run.id} failed: {_one_line(error)}; the others go on', file=sys.stderr)
    if errors:
        run, error = errors[0]
        what = f'{len(errors)} of {len(missing)} runs failed; {run.id}: {_one_line(error)} (--debug shows where)'
        rest = f'The others are in {rows.file}; the' if len(errors) < len(missing) else 'The'
        raise UsageError(f'{what}. {rest} same command goes on') from error


def _missing(runs: Sequence[Run], plan: Plan, rows: Rows, redo: bool) -> list[Run]:
    old = [run for run in runs if rows.is_outdated(plan, run)]
    if old and not redo:
        hint = f'{old[0].id} among them: make them again with --redo, or give another --out-dir'
        raise UsageError(f'{len(old)} runs in {rows.file} were made with other configs, {hint}')
    lost = {run for run in runs if plan.asks_for_weights(run) and not plan.weights(run).is_file()}
    return [run for run in dict.fromkeys(runs) if run in {*lost, *old} or run.id not in rows.by_id]


def _one_line(error: BaseException) -> str:
    if isinstance(error, BrokenExecutor):  # what any process's end does to all runs that were not made yet
        return 'a process was killed, as the system does where memory is short: try fewer --jobs'
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


@contextmanager
def _pool(jobs: int = 1, threads: int = 1, niceness: int = 0) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context('spawn')  # a fork would copy the locks of torch's threads without the threads
    pool = ProcessPoolExecutor(jobs, context, prepare_process, (threads, niceness))
    try:
        # What packages warn of while they are imported, before prepare_process() runs.
        with patch.dict(os.environ, PYTHONWARNINGS='ignore'):
            yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
