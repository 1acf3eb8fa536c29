"""Whether the study's metric is among what the evaluators give, before any run trains (ours).

What an evaluator calls its figures is known when it has given them: so the untrained model is evaluated on a few
batches, once for each evaluator of the study.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import redirect_stdout
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

from mm_sharp.analysis.study.execute import OWN_FIGURES, fit_for_many, forgotten_afterwards, numbers
from mm_sharp.analysis.study.plan import Plan, Run, order_by_need
from mm_sharp.analysis.study.progress import watch
from mm_sharp.analysis.study.rows import Rows
from mm_sharp.analysis.study.spec import BASE
from mm_sharp.cli.runners import build_runner
from mm_sharp.errors import UsageError

# Batches of the evaluation.
_FEW = 2


def check_metric(plan: Plan, rows: Rows, pool: Executor) -> None:
    """Refuse a study whose ``metric.name`` is none of the figures that its evaluators give.

    Settings with rows that have the figure are not asked again. Where the untrained model has no figures (a detector
    that finds nothing, an evaluation that fails), the first run that is evaluated has to show it.

    Args:
        plan: The study.
        rows: The runs made so far.
        pool: Evaluates.

    Raises:
        UsageError: The name is wrong.
    """
    name = plan.study.metric.name
    asked: dict[str, tuple[Run, Future[list[str]]]] = {}
    for run in _one_of_each(plan):
        evaluator = repr(plan.config(run).test_evaluator)
        if name not in OWN_FIGURES and evaluator not in asked and not rows.has_figure(run, name):
            asked[evaluator] = run, pool.submit(figure_names, plan, run)
    of = {future: run for run, future in asked.values()}
    for future in watch('checking metric.name', {future: run.setting for future, run in of.items()}):
        run, error = of[future], future.exception()
        if error is not None:
            reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
            if isinstance(error, BrokenExecutor):
                raise UsageError(f'a process that evaluated settings.{run.setting} has died: {reason}') from error
            sys.stderr.write(
                f'metric.name: {name!r} could not be checked, since settings.{run.setting} cannot be evaluated '
                f'untrained ({reason}); it will be after the first run\n'
            )
        elif future.result() and name not in future.result():
            which = 'validation' if run.phase == 'select' else 'test'
            raise UsageError(
                f'metric.name: {name!r} is not among what the {which} evaluator of settings.{run.setting} gives: '
                f'{", ".join((*future.result(), *OWN_FIGURES))}'
            )


def figure_names(plan: Plan, run: Run) -> list[str]:
    """The names of the figures that an evaluation gives; none if one of its metrics gives nothing."""
    cfg = fit_for_many(plan.config(run))
    cfg.load_from = None  # it may not be there yet
    cfg.experiment_name = f'check_{cfg.experiment_name}'
    # Forgotten before the folder goes, into which it writes.
    with TemporaryDirectory() as folder, forgotten_afterwards(), redirect_stdout(io.StringIO()):
        cfg.work_dir = folder
        runner = build_runner(cfg)
        runner._test_loop = runner.build_test_loop(runner._test_loop)
        runner._test_loop.dataloader = _FirstBatches(runner._test_loop.dataloader)
        metrics = getattr(getattr(runner._test_loop, 'evaluator', None), 'metrics', [])
        names = list(numbers(runner.test()))
    prefixes = [metric.prefix for metric in metrics if getattr(metric, 'prefix', None)]
    return names if all(any(name.startswith(f'{prefix}/') for name in names) for prefix in prefixes) else []


class _FirstBatches:
    """A loader that ends after a few batches.

    Args:
        loader: Any other.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, _FEW)

    def __len__(self) -> int:
        return min(_FEW, len(self._loader))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _one_of_each(plan: Plan) -> list[Run]:
    """A run of each setting and phase, those first that start from random weights."""
    phases = ('select', 'report') if plan.study.selection is not None else ('report',)
    settings = [setting for wave in order_by_need(plan.study.settings.values()) for setting in wave]
    return [Run(phase, s.name, BASE, None, s.epochs, plan.study.seeds[0]) for phase in phases for s in settings]
