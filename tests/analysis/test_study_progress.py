"""What a study shows while it runs: how far it is, and each run under way."""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from mm_sharp.analysis.study import Run, progress
from mm_sharp.analysis.study.progress import Board, Note, watch
from mm_sharp.analysis.study.run_missing import make_run
from tests.analysis.test_study import DIGITS, plan_of


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """Of two workers, of which this process is the second."""
    monkeypatch.setattr(progress, '_place', None)
    board = Board(2)
    board.take_place()
    board.take_place()
    return board


def test_a_note_says_what_a_run_does_and_how_long_it_will(board: Board) -> None:
    assert board.notes() == []
    for note, text, share in (
        (Note(3, 100), 'starting, 00:50 elapsed', 0),
        (Note(3, 100, 110), 'starting, 00:50 elapsed', 0),
        # Forty seconds for 20 of 80 steps.
        (Note(3, 100, 110, 20, 80, 2, 8), 'epoch 2 of 8, step 20 of 80, 00:50 elapsed, 02:00 left', 0.25),
        (Note(3, 100, 110, 1, 1, tests=1), 'evaluating, 00:50 elapsed', 1),
    ):
        progress.note_down(note)
        assert board.notes() == [note]
        assert (note.text(150), note.share) == (text, share)
    progress.note_down(Note())
    assert board.notes() == []


def _take_and_note(board: Board, run: int) -> None:
    board.take_place()
    progress.note_down(Note(run, 1.5))


@pytest.mark.filterwarnings('ignore:.*multi-threaded:DeprecationWarning')
def test_the_notes_of_processes_do_not_mix() -> None:
    board = Board(2)
    # A fork is enough here, and starts at once.
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=_take_and_note, args=(board, run)) for run in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(note.run for note in board.notes()) == [1, 2]


@pytest.mark.filterwarnings('ignore')  # as in the processes that make runs
def test_a_run_notes_every_step_and_nothing_when_it_has_ended(
    tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Note] = []
    note_down = progress.note_down

    def spy(note: Note) -> None:
        note_down(note)
        seen.extend(board.notes())

    monkeypatch.setattr(progress, 'note_down', spy)
    options = {'train_dataloader.dataset.size': 80, 'model.width': 4}
    plan = plan_of(tmp_path, settings={'clean': {'config': DIGITS, 'epochs': 2, 'options': options}})
    make_run(plan, Run('report', 'clean', 'sam', 0.1, 2, 1), 5)
    assert [(note.step, note.steps, note.epoch, note.epochs, note.tests) for note in seen] == [
        (0, 0, 0, 0, 0), (1, 4, 1, 2, 0), (2, 4, 1, 2, 0), (3, 4, 2, 2, 0), (4, 4, 2, 2, 0), (1, 1, 0, 0, 1)
    ]  # fmt: skip
    assert {note.run for note in seen} == {5}
    assert all(0 < note.begun <= note.trained for note in seen[1:])
    assert board.notes() == []


@pytest.mark.parametrize('screen', [io.StringIO, Screen])
def test_what_is_under_way_is_shown_before_anything_ends(
    board: Board, monkeypatch: pytest.MonkeyPatch, screen: type[io.StringIO]
) -> None:
    stream = screen()
    monkeypatch.setattr('sys.stderr', stream)
    monkeypatch.setattr('os.get_terminal_size', lambda _: os.terminal_size((200, 50)))
    monkeypatch.setattr(progress, '_LOOK', 0.01)
    monkeypatch.setattr(progress, '_LINE', 0.0)
    futures: dict[Future[int], str] = {Future(): 'first', Future(): 'second'}
    now = time.time()
    progress.note_down(Note(2, now, now, 30, 60, 1, 2))

    def end() -> None:
        while 'second: epoch 1 of 2, step 30 of 60' not in stream.getvalue():
            time.sleep(0.01)
        for number, future in enumerate(futures):
            future.set_result(number)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    # One of three was made before.
    assert sorted(future.result() for future in watch('all', futures, total=3, board=board)) == [0, 1]
    thread.join()
    shown = stream.getvalue()
    assert 'all: 1 of 3, 00:00 elapsed, 00:00 left' in shown
    assert 'all: 3 of 3' in shown
    assert ('50% |' in shown) == (screen is Screen)  # one run, and half of another
    assert 'first' not in shown


def test_nothing_is_shown_where_there_is_nothing_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watch('all', {}, total=3)) == []
    assert capsys.readouterr().err == ''
