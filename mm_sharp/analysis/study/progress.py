"""How far a study is, and each of the runs under way (ours).

A worker process notes its run's step in memory that it shares with the process that waits: without a lock, so that a
worker that is killed keeps nobody waiting. What is read may be half of one note and half of the next.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from typing import Any, TypeVar

from mmengine.hooks import Hook
from tqdm import tqdm

_Result = TypeVar('_Result')

# Seconds between two looks; and between two lines where they are kept, as in a file.
_LOOK, _LINE = 1.0, 60.0


@dataclass(frozen=True)
class Note:
    """Where a worker is.

    Args:
        run: Number of its run, from 1; 0 for none.
        begun: When the run began, in seconds as ``time.time()`` has them.
        trained: When its first step began; 0 before.
        step: Steps made.
        steps: In all.
        epoch: From 1.
        epochs: In all.
        tests: 1 when the steps are made and the evaluation is under way.
    """

    run: float = 0
    begun: float = 0
    trained: float = 0
    step: float = 0
    steps: float = 0
    epoch: float = 0
    epochs: float = 0
    tests: float = 0

    @property
    def share(self) -> float:
        """Of the run's steps."""
        return min(self.step / self.steps, 1.0) if self.run and self.steps else 0.0

    def text(self, now: float) -> str:
        """For people."""
        elapsed = f'{_clock(now - self.begun)} elapsed'
        if self.tests:
            return f'evaluating, {elapsed}'
        if not self.step:
            return f'starting, {elapsed}'
        left = (now - self.trained) * (self.steps - self.step) / self.step
        return (
            f'epoch {self.epoch:.0f} of {self.epochs:.0f}, step {self.step:.0f} of {self.steps:.0f}, {elapsed}, '
            f'{_clock(left)} left'
        )


_SIZE = len(fields(Note))


class Board:
    """The notes of all workers.

    Args:
        jobs: Number of workers, which are spawned.
    """

    def __init__(self, jobs: int) -> None:
        context = multiprocessing.get_context('spawn')
        self._cells = context.RawArray(ctypes.c_double, jobs * _SIZE)
        self._taken = context.Value('i', 0)

    def take_place(self) -> None:
        """In a worker, once: its notes have a place."""
        global _place
        with self._taken.get_lock():
            _place = self._cells, self._taken.value * _SIZE
            self._taken.value += 1

    def notes(self) -> list[Note]:
        """Of the workers that have a run."""
        cells = list(self._cells)
        notes = [Note(*cells[start : start + _SIZE]) for start in range(0, len(cells), _SIZE)]
        return [note for note in notes if note.run]


# Of this process: the cells of all notes, and where its own begin. Without one, nobody reads its notes.
_place: tuple[Any, int] | None = None


def note_down(note: Note) -> None:
    """In a worker: where it is now."""
    if _place is not None:
        cells, start = _place
        cells[start : start + _SIZE] = [float(value) for value in astuple(note)]


class NotingHook(Hook):  # type: ignore[misc]
    """Notes each step of a run in a worker process.

    Args:
        run: The run's number.
    """

    priority = 'VERY_LOW'

    def __init__(self, run: int) -> None:
        self._run, self._begun, self._trained = run, time.time(), 0.0
        note_down(Note(run, self._begun))

    def before_train(self, runner: Any) -> None:
        """The time that is left is reckoned from here."""
        self._trained = time.time()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """One step more."""
        steps = runner.iter + 1, runner.max_iters, runner.epoch + 1, runner.max_epochs
        note_down(Note(self._run, self._begun, self._trained, *steps))

    def before_test(self, runner: Any) -> None:
        """All steps are made."""
        note_down(Note(self._run, self._begun, self._trained, 1, 1, tests=1))


def watch(
    title: str, futures: Mapping[Future[_Result], str], *, total: int | None = None, board: Board | None = None
) -> Iterator[Future[_Result]]:
    """Futures as they end; meanwhile stderr shows how far they are: bars on a terminal, elsewhere a line a minute.

    Args:
        title: Of all.
        futures: And their names, in the order of their numbers.
        total: With those that have been made before; by default these are all.
        board: Says how far those under way are.
    """
    if not futures:
        return
    numbered = dict(enumerate(futures, 1))
    total = len(futures) if total is None else total
    waiting, begun = set(futures), time.time()
    with ExitStack() as stack:
        display = _Bars(stack) if _on_terminal() else _Lines()
        while True:
            now = time.time()
            notes = [note for note in (board.notes() if board else []) if numbered.get(int(note.run)) in waiting]
            done = len(futures) - len(waiting) + sum(note.share for note in notes)
            head = f'{title}: {total - len(waiting)} of {total}, {_clock(now - begun)} elapsed'
            if done and waiting:
                head += f', {_clock((now - begun) * (len(futures) - done) / done)} left'
            under_way = [f'{futures[numbered[int(note.run)]]}: {note.text(now)}' for note in notes]
            display.show(head, 1 - (len(futures) - done) / total, under_way, last=not waiting)
            if not waiting:
                return
            ended, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
            yield from (future for future in futures if future in ended)


class _Lines:
    """A line a minute, and one at the end."""

    def __init__(self) -> None:
        self._next = 0.0

    def show(self, head: str, share: float, under_way: Sequence[str], *, last: bool) -> None:
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE
            sys.stderr.write(f'{"; ".join([head, *under_way])}\n')
            sys.stderr.flush()


class _Bars:
    """A bar for all, and below it a line for each run under way, in their place again and again."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._all = self._bar('{desc} {percentage:3.0f}% |{bar}|', total=1.0)
        self._runs: list[Any] = []

    def show(self, head: str, share: float, under_way: Sequence[str], *, last: bool) -> None:
        while len(self._runs) < len(under_way):
            self._runs.append(self._bar('  {desc}', position=len(self._runs) + 1, leave=False))
        for number, bar in enumerate(self._runs):
            bar.set_description_str(under_way[number] if number < len(under_way) else '')
        self._all.n = share
        self._all.set_description_str(head)

    def _bar(self, form: str, **options: Any) -> Any:
        return self._stack.enter_context(tqdm(bar_format=form, dynamic_ncols=True, **options))


def _on_terminal() -> bool:
    # Some that are no screens have no width.
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _clock(seconds: float) -> str:
    return str(tqdm.format_interval(max(seconds, 0.0)))
