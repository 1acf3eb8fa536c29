"""What a study shows while it runs: how far it is, and each run in flight."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from mm_sharp.analysis.study import Run
from mm_sharp.analysis.study.run_missing import ProgressHook, make_run, watch
from mm_sharp.errors import UsageError
from tests.studies import plan_of, tiny


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.filterwarnings('ignore')  # as in the processes that make runs
def test_a_run_writes_every_step_and_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[object]] = []
    write = ProgressHook._write

    def spy(hook: ProgressHook, share: float, text: str) -> None:
        write(hook, share, text)
        seen.append(json.loads((tmp_path / 'progress.json').read_text()))

    monkeypatch.setattr(ProgressHook, '_write', spy)
    monkeypatch.setattr(sys.modules[ProgressHook.__module__], '_LOOK', 0.0)
    make_run(plan_of(tmp_path, tiny()), Run('report', 'clean', 'sam', 0.1, 2, 1), tmp_path / 'progress.json')
    assert seen[0] == [0, 'starting']
    assert seen[-1] == [1, 'evaluating']
    assert [share for share, _ in seen[1:-1]] == [0.25, 0.5, 0.75, 1]
    assert [str(text).split(', ')[:2] for _, text in seen[1:-1]] == [
        [f'epoch {epoch} of 2', f'step {step} of 4'] for epoch, step in ((1, 1), (1, 2), (2, 3), (2, 4))
    ]
    assert all(str(text).endswith(' left') for _, text in seen[1:-1])


@pytest.mark.parametrize('screen', [io.StringIO, Screen])
def test_what_is_in_flight_is_shown_before_anything_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: type[io.StringIO]
) -> None:
    stream = screen()
    monkeypatch.setattr('sys.stderr', stream)
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys.modules[ProgressHook.__module__], '_LOOK', 0.01)
    monkeypatch.setattr(sys.modules[ProgressHook.__module__], '_LINE', 0.0)
    futures = {Future[int](): ('first', tmp_path / '1.json'), Future[int](): ('second', tmp_path / '2.json')}
    (tmp_path / '2.json').write_text('[0.5, "epoch 1 of 2, step 30 of 60"]')

    def end() -> None:
        deadline = time.monotonic() + 60
        while 'second: epoch 1 of 2, step 30 of 60' not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        for number, future in enumerate(futures):
            future.set_result(number)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    # One of three was made before.
    assert sorted(future.result() for future in watch('all', futures, 3)) == [0, 1]
    thread.join()
    shown = stream.getvalue()
    assert 'all: 1.5 of 3, 00:00 elapsed, 00:00 left, second: epoch 1 of 2, step 30 of 60' in shown
    assert 'all: 3.0 of 3' in shown
    assert 'first' not in shown


def test_nothing_is_shown_where_there_is_nothing_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watch('all', {}, 3)) == []
    assert capsys.readouterr().err == ''


def test_a_data_set_that_is_smaller_than_a_study_says_is_refused(tmp_path: Path) -> None:
    cfg = Config({'train_dataloader': {'dataset': {'indices': 500}}})
    hook, loader = ProgressHook(tmp_path / 'progress.json'), SimpleNamespace(dataset=range(48))
    with pytest.raises(UsageError, match=r'dataset\.indices=500: the data set has 48 samples'):
        hook.before_train(SimpleNamespace(cfg=cfg, train_dataloader=loader))
    hook.before_train(SimpleNamespace(cfg=cfg, train_dataloader=SimpleNamespace(dataset=range(500))))
