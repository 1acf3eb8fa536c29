"""The file with one row a run, from which a study that was broken off goes on (ours)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mm_sharp.analysis.study.plan import Run
from mm_sharp.errors import UsageError

KEYS = ('id', 'phase', 'setting', 'method', 'rho', 'epochs', 'seed', 'config')


class Rows:
    """The runs that have been made.

    Args:
        file: ``results.csv``; read if it is there. Each new row is written at once; without one nothing is.

    Raises:
        UsageError: The file is not one of these.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.by_id: dict[str, dict[str, str]] = {}
        self._columns: list[str] = []
        self._cut_off = False
        if not file.is_file() or not file.stat().st_size:
            return
        text = file.read_text()
        # A process that is killed while it writes leaves a line that is cut off.
        whole = text[: text.rindex('\n') + 1] if '\n' in text else ''
        reader = csv.DictReader(whole.splitlines())
        self._columns = list(reader.fieldnames or [])
        if not set(KEYS) <= set(self._columns):
            raise UsageError(f"'{file}' is not a study's table of runs: move it away")
        self.by_id = {row['id']: row for row in reader}
        # Mended with the next row: who only reads may do so while another process writes.
        self._cut_off = whole != text

    def has(self, run: Run, config: str) -> bool:
        """Whether a run has been made, with the same config."""
        return self.by_id.get(run.id, {}).get('config') == config

    def outdated(self, run: Run, config: str) -> bool:
        """Whether a run has been made with another config."""
        return run.id in self.by_id and not self.has(run, config)

    def has_figure(self, run: Run, metric: str) -> bool:
        """Whether any run of the same setting and phase has such a figure."""
        same = [row for row in self.by_id.values() if (row['setting'], row['phase']) == (run.setting, run.phase)]
        return any(row.get(metric) for row in same)

    def add(self, run: Run, config: str, figures: Mapping[str, float]) -> None:
        """Append a run's row, or put it in place of an older one.

        Args:
            run: The run.
            config: Fingerprint of its config.
            figures: What came out.
        """
        told = {'id': run.id, **asdict(run), 'config': config, **figures}
        row = {name: '' if value is None else str(value) for name, value in told.items()}
        new = [name for name in row if name not in self._columns]
        replaces = row['id'] in self.by_id
        self.by_id[row['id']] = row
        self._columns += new
        if new or replaces or self._cut_off:
            self._write_all()
            self._cut_off = False
            return
        with self.file.open('a', newline='') as stream:
            self._writer(stream).writerow(row)

    def value(self, run: Run, metric: str) -> float:
        """A figure of a run.

        Raises:
            UsageError: The run's row has no such figure.
        """
        row = self.by_id[run.id]
        if not row.get(metric):
            known = [name for name, value in row.items() if name not in KEYS and value]
            raise UsageError(f'metric.name: {metric!r} is not among what {run.id} gave: {", ".join(known)}')
        return float(row[metric])

    def _write_all(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix('.tmp')
        with draft.open('w', newline='') as stream:
            writer = self._writer(stream)
            writer.writeheader()
            writer.writerows(self.by_id.values())
        draft.replace(self.file)

    def _writer(self, stream: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, self._columns, restval='', lineterminator='\n')
