"""One run of a study, in a process that makes many: importing MMPose takes longer than training a small model."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin, import_modules_from_strings

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.progress import ProgressHook
from mm_sharp.cli.process import end_with_parent
from mm_sharp.cli.runners import build_runner
from mm_sharp.compat import enable_for_all_runs


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

    Returns:
        The evaluators' metrics by name, those that are numbers; ``train_loss``, the mean of the last 50 steps;
        ``steps``; ``train_seconds``, which say little where other programs share the machine; and ``cost_seconds``,
        what training has cost: on a CPU the seconds that this process had a processor, on a GPU those on the clock.
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
        for handler in [
            h for kept in kind._instance_dict.values() if isinstance(kept, MMLogger) for h in kept.handlers
        ]:
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
