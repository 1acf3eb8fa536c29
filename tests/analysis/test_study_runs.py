"""tools/study.py: its runs are those of tools/train.py, and a study that was broken off goes on where it was."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mm_sharp.analysis.study import Plan, Rows, Run, locked, run_missing
from mm_sharp.analysis.study.results import timed_runs
from mm_sharp.analysis.study.run_missing import make_run, numbers
from mm_sharp.cli import options as cli
from mm_sharp.errors import UsageError
from tests.conftest import ROOT
from tests.studies import TINY, plan_of, tiny, write
from tests.tiny_data import draw_coco
from tests.tool_runs import tool

# The runs of tiny(), by phase.
SELECT, REPORT = 3, 6


class Here:
    """Stands in for a pool of processes: a run is made when it is asked for, here, and trains only if ``trains``."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fails_at: int | None = None
        self.error: Exception = RuntimeError('out of\nmemory')
        self.trains = False

    def __call__(self, *args: Any, **kwargs: Any) -> Here:
        return self

    def submit(self, call: Any, plan: Plan, run: Run, progress: Path) -> Future[Any]:
        future: Future[Any] = Future()
        self.made.append(run.id)
        if len(self.made) == self.fails_at:
            future.set_exception(self.error)
        elif self.trains:
            future.set_result(call(plan, run, progress))
        else:
            plan.weights(run).parent.mkdir(parents=True, exist_ok=True)
            plan.weights(run).touch()
            future.set_result({'digits/accuracy': 90.0 + (run.rho or 0) + run.seed, 'steps': 4.0})
        return future

    def shutdown(self, **kwargs: Any) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    pool = Here()
    monkeypatch.setattr(sys.modules['mm_sharp.analysis.study.run_missing'], 'ProcessPoolExecutor', pool)
    # As in the processes that it stands in for: every run's checkpoints are plain.
    monkeypatch.setattr('mm_sharp.compat.checkpoint_hook._in_every_run', True)
    return pool


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the tool in this process; returns the exit code and all that it printed."""
    monkeypatch.setattr(sys, 'argv', ['tools/study.py', *map(str, arguments)])
    code = cli.run_tool(tool('study').main)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / 'results.csv').open(newline='') as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_study_runs_from_the_command_line_in_processes_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    command = [sys.executable, ROOT / 'tools/study.py', write(tmp_path, tiny()), '--out-dir', out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    assert 'choosing rho' in done.stderr
    assert '**clean, equal compute** (digits/accuracy, 2 seeds)' in done.stdout
    rows = rows_of(out)
    assert len(rows) == SELECT + REPORT
    assert {row['phase'] for row in rows} == {'select', 'report'}
    assert all(0 <= float(row['digits/accuracy']) <= 100 and float(row['train_loss']) > 0 for row in rows)
    assert {(row['epochs'], row['steps']) for row in rows} == {('1', '2.0'), ('2', '4.0')}
    for name in ('table.md', 'comparisons.json', 'differences.png'):
        assert (out / name).stat().st_size > 100
    (kept,) = sorted((out / 'weights').rglob('*_2e_*.pth'))
    weights = torch.load(kept, weights_only=True)
    assert 'backbone.0.weight' in weights['state_dict']
    assert 'optimizer' not in weights


@pytest.mark.slow
def test_a_run_is_what_the_runner_makes_of_the_same_config(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tiny())
    run = Run('report', 'clean', 'sam', 0.1, 2, 0)
    metrics = make_run(plan, run, tmp_path / 'progress.json')
    cfg = plan.config(run)
    cfg.experiment_name = 'by_hand'
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.test()['digits/accuracy'] == metrics['digits/accuracy']
    kept = torch.load(plan.weights(run), weights_only=True)['state_dict']
    for name, value in runner.model.state_dict().items():
        assert torch.equal(kept[name], value), name


@pytest.mark.slow
def test_the_runs_at_equal_time_follow_those_at_equal_epochs(tmp_path: Path, here: Here) -> None:
    here.trains = True
    plan = plan_of(tmp_path, tiny(selection=None, budgets=['epochs', 'time'], keep=[]))
    rows = Rows(tmp_path / 'out' / 'results.csv')
    run_missing(plan, rows)
    assert here.made[:4] == [run.id for run in plan.report_runs('clean', {'base': None, 'sam': None})]
    assert all(float(row['cost_seconds']) > 0 for row in rows.by_id.values())
    # Whatever was measured here, its runs have been made, once.
    timed = timed_runs(plan, rows, 'clean', {'base': None, 'sam': None})
    assert {run.id for run in timed} <= set(rows.by_id)
    assert len(here.made) == len(set(here.made))


@pytest.mark.parametrize('named', [False, True], ids=['', 'a visualizer with a name'])
def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one process may begin in the same second, by which MMEngine names what it keeps of them."""
    settings = {'clean': {**TINY, 'options': dict(TINY['options'])}}
    if named:
        visualizer = {'type': 'Visualizer', 'name': 'pictures', 'vis_backends': [{'type': 'LocalVisBackend'}]}
        settings['clean']['options']['visualizer'] = visualizer
    plan = plan_of(tmp_path, tiny(settings=settings))
    run, other = (Run('report', 'clean', 'sam', 0.1, 2, seed) for seed in (1, 2))
    alone = make_run(plan, run, tmp_path / 'progress.json')
    config = plan.config

    def failing(run: Run) -> Any:
        cfg = config(run)
        cfg.custom_hooks = [dict(type='FailsLate')]
        return cfg

    with monkeypatch.context() as patch:
        patch.setattr(plan, 'config', failing)
        with pytest.raises(RuntimeError, match='out of memory'):
            make_run(plan, other, tmp_path / 'progress.json')
    plan.folder = tmp_path / 'again'
    assert make_run(plan, run, tmp_path / 'progress.json')['train_loss'] == alone['train_loss']
    if named:
        assert list((tmp_path / 'again' / 'runs' / run.id).glob('*/vis_data/scalars.json'))


@HOOKS.register_module()
class FailsLate(Hook):
    def after_train_epoch(self, runner: Any) -> None:
        raise RuntimeError('out of memory')


def test_rows_are_compared_without_the_data_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(Path('configs/study/demo.yaml').read_text())
    content['settings']['demo-512']['options'] = {'train_dataloader.dataset.data_root': 'nowhere/'}
    out = tmp_path / 'out'
    out.mkdir()
    shutil.copy('docs/data/study_demo.csv', out / 'results.csv')
    arguments = (write(tmp_path, content), '--out-dir', out)
    code, printed = call(monkeypatch, capsys, *arguments, '--table')
    assert (code, '| ausam |  | 19 | 1.00 |' in printed) == (0, True)
    code, printed = call(monkeypatch, capsys, *arguments)
    assert (code, "no data: 'nowhere/" in printed) == (2, True)


def test_where_all_runs_fail_there_are_no_others(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.fails_at = 1
    file = write(tmp_path, tiny(selection=None, seeds=[0], methods={'base': {}}, keep=[]))
    code, printed = call(monkeypatch, capsys, file, '--out-dir', tmp_path / 'out')
    assert code == 2
    assert '1 of 1 runs failed' in printed
    assert 'The same command goes on' in printed


def test_a_killed_process_ends_all_runs(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.fails_at, here.error = 1, BrokenProcessPool('terminated abruptly')
    file = write(tmp_path, tiny(selection=None, seeds=[0], keep=[]))
    code, printed = call(monkeypatch, capsys, file, '--out-dir', tmp_path / 'out')
    assert code == 2
    assert 'a process was killed, as the system does where memory is short: try fewer --jobs' in printed
    assert 'the others go on' not in printed


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path, tiny()), tmp_path / 'out'
    arguments = (file, '--out-dir', out)

    code, printed = call(monkeypatch, capsys, *arguments, '--table')
    assert (code, printed) == (2, f"study.py: error: no runs in '{out}' yet: without --table they are made\n")

    here.fails_at = 2
    code, printed = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert '1 of 3 runs failed; select/clean/sam_rho0.05_2e_seed100: RuntimeError: out of memory' in printed
    assert f'The others are in {out / "results.csv"}; the same command goes on' in printed
    assert len(rows_of(out)) == SELECT - 1

    here.fails_at = None
    code, printed = call(monkeypatch, capsys, *arguments, '--table')
    assert code == 0
    assert '| sam | 0.05 |  | 0 of 1 |' in printed
    assert '- clean: rho is not chosen yet: 2 of 3 runs made for it' in printed
    assert f'{out}: results.csv, table.md\n' in printed
    here.made.clear()
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert len(here.made) == 1 + REPORT
    before = (out / 'comparisons.json').read_text()

    here.made.clear()
    code, printed = call(monkeypatch, capsys, *arguments, '--table')
    assert (code, here.made) == (0, [])
    assert '| sam |' in printed
    lines = (out / 'results.csv').read_text().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if line.startswith('report/clean/base'))
    (out / 'results.csv').write_text(''.join(lines[:lost] + lines[lost + 1 :]))
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert here.made == [lines[lost].split(',')[0]]
    assert (out / 'comparisons.json').read_text() == before

    write(tmp_path, tiny(settings={'clean': {**TINY, 'options': {'model.width': 8}}}))
    code, printed = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert '3 runs in' in printed
    assert 'were made with other configs' in printed
    here.made.clear()
    code, printed = call(monkeypatch, capsys, *arguments, '--redo')
    assert (code, '--redo' in printed) == (0, False)
    assert len(here.made) == SELECT + REPORT
    code, printed = call(monkeypatch, capsys, *arguments, '--redo')
    assert (code, printed.startswith('--redo: no config has changed since its run')) == (0, True)
    assert len(here.made) == SELECT + REPORT
    # Rows of a rho that is not chosen any more stay.
    assert {row['id'] for row in rows_of(out)} >= set(here.made)


def test_a_folder_belongs_to_one_process_until_it_ends(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    out.mkdir()
    # Another process, with as few imports as it can have.
    hold = (
        'import fcntl, os, socket, sys\n'
        'lock = open(sys.argv[1], "w")\n'
        'fcntl.flock(lock, fcntl.LOCK_EX)\n'
        'print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)\n'
        'print("held", flush=True)\n'
        'input()\n'
    )
    command = [sys.executable, '-S', '-c', hold, str(out / '.lock')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == 'held\n'
        code, printed = call(monkeypatch, capsys, write(tmp_path, tiny()), '--out-dir', out)
        assert (code, here.made, len(printed.splitlines())) == (2, [], 1)
        assert f"process {other.pid} on {socket.gethostname()} makes runs in '{out}'" in printed
        other.kill()
    with locked(out):  # it did not say goodbye
        assert (out / '.lock').read_text() == f'process {os.getpid()} on {socket.gethostname()}'
        with pytest.raises(UsageError, match=f'process {os.getpid()} '), locked(out):
            pass
    with locked(out):
        pass


def test_ctrl_c_says_what_is_kept_and_lets_go_of_the_folder(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules['mm_sharp.analysis.study.run_missing'], 'watch', interrupt)
    code, printed = call(monkeypatch, capsys, write(tmp_path, tiny()), '--out-dir', out)
    assert code == 130
    line = f'study.py: interrupted; 0 runs are in {out}/results.csv; the same command goes on'
    assert printed.splitlines()[-1] == line
    with locked(out):
        pass


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.flock', refuse)
    with locked(tmp_path):
        pass
    assert f"'{tmp_path}' cannot be locked ([Errno {errno.ENOLCK}] No locks available)" in capsys.readouterr().err


def test_a_wrong_metric_shows_after_the_first_run_which_counts(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path, tiny(metric={'name': 'digits/acc'})), tmp_path / 'out'
    code, printed = call(monkeypatch, capsys, file, '--out-dir', out)
    line = "metric.name: 'digits/acc' is not among what select/clean/base_2e_seed100 gave: digits/accuracy, steps"
    assert code == 2
    assert printed.splitlines()[-1].endswith(line)
    assert len(rows_of(out)) == 1
    write(tmp_path, tiny())
    here.made.clear()
    assert call(monkeypatch, capsys, file, '--out-dir', out)[0] == 0
    assert len(here.made) == SELECT + REPORT - 1


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    metrics = {'a': torch.tensor(1.5), 'b': 2, 'table': torch.ones(2, 2), 'list': [1], 'text': 'x', 'c': np.float32(3)}
    assert numbers(metrics) == {'a': 1.5, 'b': 2.0, 'c': 3.0}


@pytest.mark.filterwarnings('ignore')  # as in the processes that Here stands in for
def test_a_setting_starts_from_anothers_weights(tmp_path: Path, here: Here) -> None:
    short = {**TINY, 'epochs': 1}
    settings = {'tuned': {**short, 'load_from': 'clean'}, 'clean': short}
    changes = {'settings': settings, 'seeds': [0], 'budgets': ['epochs'], 'selection': None}
    plan, here.trains = plan_of(tmp_path, tiny(**changes)), True
    run_missing(plan, Rows(tmp_path / 'out/results.csv'))
    made = [f'report/{setting}/{name}_1e_seed0' for setting in ('clean', 'tuned') for name in ('base', 'sam')]
    assert here.made == made
    # With other weights to start from, runs are made again whose own configs are what they were.
    here.trains, here.made = False, []
    settings['clean'] = {**short, 'options': {**short['options'], 'train_dataloader.batch_size': 20}}
    wider = plan_of(tmp_path, tiny(**changes))
    rows = Rows(tmp_path / 'out/results.csv')
    assert wider.fingerprint(Run('report', 'tuned', 'sam', None, 1, 0)) == rows.config(
        Run('report', 'tuned', 'sam', None, 1, 0)
    )
    run_missing(wider, rows, redo=True)
    assert here.made == made
    run_missing(wider, rows, redo=True)
    assert here.made == made
    # Weights that are gone are made again only for a run that is to start from them.
    start = Run('report', 'clean', 'base', None, 1, 0)
    wider.weights(start).unlink()
    run_missing(wider, rows)
    assert here.made == made
    here.made.clear()
    del rows.by_id['report/tuned/sam_1e_seed0']
    run_missing(wider, rows)
    assert here.made == [start.id, 'report/tuned/sam_1e_seed0']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--jobs', '0'), '--jobs 0: it must be an integer from 1'),
        (('--nice', '20'), '--nice 20'),
        (('--settings', 'none'), "--settings: 'none' is not allowed: it must be one of clean"),
        (('--out-dir', '/dev/null/out'), "the folder '/dev/null/out' cannot be made"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    code, printed = call(monkeypatch, capsys, write(tmp_path, tiny()), '--out-dir', tmp_path / 'out', *arguments)
    assert code == 2
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_cached_data_set_gives_what_the_plain_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.registry import DefaultScope
    from mmpose.registry import DATASETS

    import mm_sharp.analysis.study.cached  # noqa: F401  (registers it)

    folder = draw_coco(tmp_path / 'data')
    codec = dict(type='SimCCLabel', input_size=(48, 64), sigma=(2.0, 2.0), simcc_split_ratio=2.0)
    pipeline = [
        dict(type='LoadImage'),
        dict(type='GetBBoxCenterScale'),
        dict(type='TopdownAffine', input_size=(48, 64)),
        dict(type='GenerateTarget', encoder=codec),
        dict(type='PackPoseInputs'),
    ]
    config = dict(
        data_root=str(folder),
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        pipeline=pipeline,
    )
    with DefaultScope.overwrite_default_scope('mmpose'):
        plain = DATASETS.build(dict(type='CocoDataset', **config))
        first = DATASETS.build(dict(type='CachedCocoDataset', **config))
        want = [plain[i] for i in range(len(plain))]
        got = [first[i] for i in range(len(first))]
        # From here on nothing is read from the disk, by a later data set with the same arguments neither.
        monkeypatch.setattr('mmpose.datasets.transforms.LoadImage.transform', lambda *_: pytest.fail('read again'))
        again = DATASETS.build(dict(type='CachedCocoDataset', **config))
        got += [again[i] for i in range(len(again))]
        first[0]['data_samples'].set_metainfo({'touched': True})
    for number, sample in enumerate(got):
        wanted = want[number % len(want)]
        assert torch.equal(sample['inputs'], wanted['inputs'])
        labels, wanted_labels = (one['data_samples'].gt_instance_labels for one in (sample, wanted))
        assert torch.equal(labels.keypoint_x_labels, wanted_labels.keypoint_x_labels)
    assert 'touched' not in again[0]['data_samples'].metainfo
