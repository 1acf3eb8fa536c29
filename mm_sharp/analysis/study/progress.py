"""Shows how far a study is, and each run in flight, which writes to a file of its own how far it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mmengine.hooks import Hook
from tqdm import tqdm

_Result = TypeVar('_Result')

_LOOK, _LINE = 1.0, 60.0  # seconds between two looks; and between two lines where they are kept, as in a file


class ProgressHook(Hook):  # type: ignore[misc]
    """Writes to a file how far its run is: the share of its steps, and a text for people."""

    priority = 'VERY_LOW'

    def __init__(self, file: Path) -> None:
        self._file, self._begun, self._written = file, time.time(), 0.0
        self._write(0, 'starting')

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
