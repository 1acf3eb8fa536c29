"""What a training run has left in its work directory."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mm_sharp.errors import UsageError

Curve = Sequence[tuple[int, float]]  # iterations or epochs, and values

# As the validation loop's entries of the log are known: training's have a learning rate.
_TRAINING = 'lr'


@dataclass(frozen=True)
class TrainedRun:
    """A run of ``tools/train.py``: its config, its checkpoints and its log."""

    name: str
    folder: Path
    cfg: Config
    checkpoints: dict[int, Path]  # by epoch, in their order
    log: list[dict[str, Any]]  # MMEngine's scalars, in the order in which they were written

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return next(reversed(self.checkpoints.values()))

    def training(self, key: str) -> Curve:
        """A scalar of the training steps that were logged: iterations, and values."""
        return [(entry['step'], entry[key]) for entry in self.log if _TRAINING in entry and key in entry]

    def held_out(self, key: str) -> Curve:
        """A metric on the validation data: epochs, and values."""
        return [(entry['step'], entry[key]) for entry in self.log if _TRAINING not in entry and key in entry]

    def final(self, key: str) -> float | None:
        """The last value of a metric on the validation data; None if it was never measured."""
        found = self.held_out(key)
        return found[-1][1] if found else None

    def seconds(self) -> float:
        """Time of all training steps without loading data: the median step's, times their number."""
        steps = [entry for entry in self.log if _TRAINING in entry]
        median = statistics.median(entry['time'] - entry['data_time'] for entry in steps)
        return float(median * steps[-1]['step'])


def read_run(name: str, folder: Path) -> TrainedRun:
    """Read a work directory; a run that was interrupted and resumed has several logs, which are joined.

    Raises:
        UsageError: There is no log, no config or no checkpoint of a whole epoch in it.
    """
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    files = sorted(folder.glob('epoch_*.pth'), key=_epoch)
    if not logs or not files:
        missing = 'checkpoint of a whole epoch' if logs else 'log'
        raise UsageError(f"'{folder}' has no {missing}: give the --work-dir of a run of tools/train.py")
    cfg = Config.fromfile(logs[-1].with_name('config.py'), format_python_code=False)
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    # What was done again after an interruption counts once.
    log = {(_TRAINING in entry, entry['step'], *(key for key in entry if '/' in key)): entry for entry in entries}
    return TrainedRun(name, folder, cfg, {_epoch(file): file for file in files}, list(log.values()))


def _epoch(file: Path) -> int:
    (number,) = re.findall(r'\d+', file.stem) or ['0']
    return int(number)
