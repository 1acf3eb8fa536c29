"""One run of a study, in a process that makes many of them one after the other (ours).

Starting Python and importing MMPose takes longer than training a small model.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin, import_modules_from_strings

from mm_sharp.analysis.study.progress import Board, NotingHook
from mm_sharp.cli.process import end_with_parent
from mm_sharp.cli.runners import build_runner
from mm_sharp.compat import enable_for_all_runs

# Steps whose mean loss is a run's training loss.
LAST_STEPS = 50
# A run's figures besides those of the evaluators.
OWN_FIGURES = ('train_loss', 'steps', 'train_seconds')


def prepare_process(threads: int, niceness: int, board: Board | None = None) -> None:
    """Set up a process for runs.

    Args:
        threads: Of torch on the CPU.
        niceness: Added to the process's, so that other work on the machine goes first.
        board: Where it notes how far its run is.
    """
    if board is not None:
        board.take_place()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    torch.set_num_threads(threads)
    os.nice(niceness)
    end_with_parent()
    # What training scripts would print once is printed hundreds of times here.
    warnings.filterwarnings('ignore')
    enable_for_all_runs()


def execute(cfg: Config, weights: Path | None, number: int = 1) -> dict[str, float]:
    """Train, and evaluate on the test data.

    Args:
        cfg: The whole config of the run, without validation.
        weights: Where to write the final weights, as ``tools/test.py`` takes them; None for nowhere.
        number: Of the run, which its progress is noted under.

    Returns:
        The evaluators' metrics by name, those that are numbers; ``train_loss``, mean of the last :data:`LAST_STEPS`
        steps; ``steps``; and ``train_seconds``, which say little where other programs share the machine.
    """
    notes = NotingHook(number)
    cfg = fit_for_many(cfg)
    with forgotten_afterwards(), redirect_stdout(io.StringIO()):  # the COCO API prints what it loads
        runner = build_runner(cfg)
        runner.register_hook(notes)
        begin = time.perf_counter()
        runner.train()
        seconds = time.perf_counter() - begin
        metrics = runner.test()
        if weights is not None:
            weights.parent.mkdir(parents=True, exist_ok=True)
            runner.save_checkpoint(str(weights.parent), weights.name, save_optimizer=False, save_param_scheduler=False)
        loss = runner.message_hub.get_scalar('train/loss').mean(LAST_STEPS)
        figures = {**metrics, **dict(zip(OWN_FIGURES, (loss, runner.iter, seconds), strict=True))}
        del runner
    return numbers(figures)


def fit_for_many(cfg: Config) -> Config:
    """A run's config for a process that makes many runs."""
    if cfg.get('custom_imports'):  # which MMEngine obeys when it reads a file, in another process
        import_modules_from_strings(**cfg.custom_imports)
    # Six times in a run, MMEngine would have the config's text formatted as code, which takes longer than many epochs.
    cfg = Config(cfg.to_dict(), format_python_code=False)
    cfg.log_level = 'WARNING'
    # A run that is broken off is made again: nothing goes on from a checkpoint.
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': None}
    return cfg


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those of an evaluation's figures that are single numbers: some evaluators give tables, too."""
    found = {}
    for name, value in figures.items():
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Let go of what MMEngine would keep of a run as long as the process lives.

    It keeps it by names, those of runs by the second: the next run would be given what is left of one that failed, or
    the folder of the first one's pictures.
    """
    before = _names()
    try:
        yield
    finally:
        for kind, names in _names().items():
            for name in names - before.get(kind, set()):
                kept = kind._instance_dict.pop(name)
                for handler in list(kept.handlers) if isinstance(kept, MMLogger) else ():
                    handler.close()
        gc.collect()


def _names() -> dict[type[ManagerMixin], set[str]]:
    """What MMEngine keeps now: loggers, message hubs, visualizers and scopes, by their names."""
    kinds: list[type[ManagerMixin]] = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind: set(kind._instance_dict) for kind in kinds}
