"""tools/compare_runs.py on two tiny runs: the table is the log's, the sheet shows what MMPose finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mm_sharp.analysis.runs.people import Keypoints, Person, draw_people, find_people, not_drawn
from mm_sharp.analysis.runs.trained_run import TrainedRun, draw_curves, held_out_metric, metrics_table, read_run, rises
from mm_sharp.errors import UsageError
from tests.recipe_runs import QUIET
from tests.tiny_data import NARROW_RECIPE, draw_coco
from tests.tool_runs import PLAIN, Tools, tool

pytestmark = QUIET
EPOCHS = 2


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    """Two trained runs, ``base`` and ``ausam``, and the tools in their folder."""
    data = draw_coco(tmp_path / 'people')
    tools = Tools(tmp_path, monkeypatch, capsys)
    for name in ('base', 'ausam'):
        base = PLAIN if name == 'base' else PLAIN.with_name('simcc_res18-half_ausam_demo-128x96.py')
        (tmp_path / f'{name}.py').write_text(NARROW_RECIPE.format(base=base, data=data, width=4))
        changes = f'visualizer.name={name}', f'train_cfg.max_epochs={EPOCHS}', 'default_hooks.checkpoint.save_best=None'
        tools('train', f'{name}.py', '--work-dir', name, '--cfg-options', *changes)
    return tools


@pytest.mark.slow
def test_two_runs_side_by_side(tools: Tools, tmp_path: Path) -> None:
    arguments = ['base=base', 'ausam=ausam', '--out-dir', 'out', '--people', '2', '--samples', '4', '--threshold', '0']
    tool('compare_runs').main(_in(tmp_path, arguments))
    runs = [read_run(name, tmp_path / name) for name in ('base', 'ausam')]

    head, _, *rows = (tmp_path / 'out' / 'table.md').read_text().splitlines()
    assert head == '| run | AP | PCK | epochs | time | sharpness |'
    for run, row in zip(runs, rows, strict=True):
        (log,) = run.folder.glob('*/vis_data/scalars.json')
        *_, last = [line for line in map(json.loads, log.read_text().splitlines()) if 'coco/AP' in line]
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        assert cells[:4] == [run.name, f'{last["coco/AP"]:.3f}', f'{last["PCK"]:.3f}', str(EPOCHS)]
        assert float(cells[4]) > 0
        assert list(run.checkpoints) == [1, EPOCHS]
        assert [step for step, _ in run.training('loss')] == [1, 2, 3, 4]
        assert [epoch for epoch, _ in run.held_out('coco/AP')] == [1, EPOCHS]
    assert rows[0].split('|')[5].strip() == '1.00'
    sheet = cv2.imread(str(tmp_path / 'out' / 'people.png'))
    # Two rows of three pictures of 96x128, three times as large.
    assert sheet.shape[1] >= 3 * 3 * 96
    assert sheet.shape[0] >= 2 * 3 * 128
    assert cv2.imread(str(tmp_path / 'out' / 'curves.png')).shape[1] > 1000

    _check_predictions(runs, tmp_path)
    _check_sharpness(runs[0])
    _check_quantized_column(runs[0])


def _in(folder: Path, arguments: list[str]) -> list[str]:
    """Arguments whose folders are in ``folder``."""
    return [a.replace('=', f'={folder}/') if '=' in a else str(folder / a) if a == 'out' else a for a in arguments]


def _check_predictions(runs: list[TrainedRun], folder: Path) -> None:
    """The sheet's first column is the annotation, the others what MMPose's own interface finds."""
    from mmpose.apis import inference_topdown, init_model

    annotations = json.loads((folder / 'people/annotations/person_keypoints_val.json').read_text())['annotations']
    people, links = find_people(runs, 2, threshold=0.0)
    models = [init_model(str(folder / f'{run.name}.py'), str(run.last), device='cpu') for run in runs]
    for person, own in zip(people, (annotations[0], annotations[-1]), strict=True):
        assert np.allclose(person.columns[0].points, np.reshape(own['keypoints'], (-1, 3))[:, :2])
        x, y, width, height = own['bbox']
        file = str(folder / 'people' / 'val' / f'{own["image_id"]:06d}.png')
        assert np.array_equal(person.picture, cv2.imread(file)[:, :, ::-1])
        for model, found in zip(models, person.columns[1:], strict=True):
            (alone,) = inference_topdown(model, file, [[x, y, x + width, y + height]])
            assert np.allclose(found.points, alone.pred_instances.keypoints[0], atol=1e-3)
    none, _ = find_people(runs, 1, threshold=2.0)
    assert not any(column.drawn.any() for column in none[0].columns[1:])
    assert (15, 13) in links


def _check_sharpness(run: TrainedRun) -> None:
    """It is above 0, repeats, and vanishes with rho."""
    measured, again, none = rises(run, 4, batch_size=2), rises(run, 4, batch_size=2), rises(run, 4, rho=1e-9)
    assert [epoch for epoch, _ in measured] == [1, EPOCHS]
    assert measured == again
    assert len(rises(run, 1000)) == EPOCHS  # more than there are
    assert all(value > 0 for _, value in measured)
    assert all(abs(small) < 0.01 * value for (_, small), (_, value) in zip(none, measured, strict=True))


def _check_quantized_column(run: TrainedRun) -> None:
    """A run that was quantized first has what it began with in the table."""
    began = {'post_training/coco/AP': 0.125, 'step': 0}
    head, _, plain, quantized = metrics_table([run, replace(run, log=[began, *run.log])], {}).splitlines()
    assert head == '| run | AP | PCK | AP before | epochs | time |'
    assert plain.split('|')[4].strip() == ''
    assert quantized.split('|')[4].strip() == '0.125'


def test_what_a_quantized_run_began_with_is_the_metric_that_is_compared() -> None:
    began, ended = {'post_training/PCK': 0.5, 'post_training/NME': 0.25}, {'PCK': 0.75, 'NME': 0.125}
    for metric, title, value in (('PCK', 'PCK before', '0.500'), ('NME', 'NME before', '0.250')):
        head, _, row = metrics_table([_run(began, ended)], {}, metric).splitlines()
        cells = dict(zip(*([cell.strip() for cell in line.split('|')] for line in (head, row)), strict=True))
        assert cells[title] == value


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['base', '--out-dir', 'out'], 'give each run a name of its own, as base='),
        (['a=x', 'a=y', '--out-dir', 'out'], 'give each run a name of its own'),
        (['a=nothing', '--out-dir', 'out'], "'nothing' has no log: give the --work-dir"),
        (['a=x', '--out-dir', 'out', '--people', '-1'], '--people -1: it must be at least 0'),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tool('compare_runs').main(arguments)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--samples', '2'), r"'run' has no train_dataloader: leave it out with --samples 0"),
        (('--samples', '0'), r"no data: 'none/test\.json' \(test_dataloader\.dataset\.ann_file\)"),
    ],
)
def test_runs_whose_data_is_not_there(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'run' / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    data = "test_dataloader = dict(dataset=dict(type='CocoDataset', data_root='none', ann_file='test.json'))"
    (folder / 'config.py').write_text(f'train_cfg = dict(max_epochs=1)\n{data}\n')
    (folder / 'scalars.json').write_text('{"lr": 0.1, "loss": 1.0, "time": 1.0, "data_time": 0.5, "step": 1}\n')
    torch.save({}, tmp_path / 'run' / 'epoch_1.pth')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        tool('compare_runs').main(['a=run', '--out-dir', 'out', *options])


def test_keypoints_below_the_threshold_are_not_drawn(tmp_path: Path) -> None:
    picture = np.full((60, 40, 3), 128, np.uint8)
    points = np.array([[10.0, 10.0], [30.0, 30.0], [20.0, 50.0]])

    def sheet(points: Any, drawn: list[bool]) -> Any:
        truth = Keypoints(np.zeros((3, 2)), np.array([False, False, True]))
        people = [Person(picture, [truth, Keypoints(points, np.array(drawn))])]
        draw_people(people, ['annotated', 'base'], [(0, 1)], tmp_path / 'sheet.png')
        return cv2.imread(str(tmp_path / 'sheet.png'))[24:]  # without the titles

    moved = points + np.array([[0, 0], [5, 5], [0, 0]])
    assert not np.array_equal(sheet(points, [True, True, False]), sheet(moved, [True, True, False]))
    assert np.array_equal(sheet(points, [True, False, False]), sheet(moved, [True, False, False]))


def test_a_column_without_keypoints_is_named() -> None:
    seen, unseen = (Keypoints(np.zeros((2, 2)), np.array([False, drawn])) for drawn in (True, False))
    people = [Person(np.zeros((4, 4, 3)), [seen, *columns]) for columns in ([unseen, unseen], [seen, unseen])]
    assert not_drawn(people, ['base', 'sam']) == ['sam']


def _run(*evaluations: dict[str, Any]) -> TrainedRun:
    """A run whose log is one training step and some evaluations."""
    step = {'lr': 0.1, 'loss': 1.0, 'time': 1.0, 'data_time': 0.5, 'step': 1}
    cfg = Config({'train_cfg': {'max_epochs': 1}})
    log = [step, *({'time': 1.0, 'data_time': 0.5, 'step': 1, **found} for found in evaluations)]
    return TrainedRun('a', Path(), cfg, {}, log)


def test_any_metric_is_compared(tmp_path: Path) -> None:
    face, person, none = _run({'NME': 0.25, 'AUC': 0.5}), _run({'coco/AR': 0.5, 'PCK': 0.75}), _run()
    assert [held_out_metric([run], None) for run in (face, person, none)] == ['NME', 'PCK', None]
    assert held_out_metric([face, none], 'AUC') == 'AUC'
    assert held_out_metric([_run({'steps/PCK': 0.5, 'time_to_hit': 0.5})], None) == 'steps/PCK'
    with pytest.raises(UsageError, match=r"--metric 'auc': no run has it; there are NME, AUC"):
        held_out_metric([face], 'auc')
    head, _, row = metrics_table([face], {}, 'NME').splitlines()
    assert (head, row.split('|')[2].strip()) == ('| run | NME | epochs | time |', '0.250')
    for metric in ('NME', None):
        draw_curves([face], metric, {}, tmp_path / f'{metric}.png')
    assert cv2.imread(str(tmp_path / 'NME.png')).shape[1] > cv2.imread(str(tmp_path / 'None.png')).shape[1]


def test_a_log_of_several_wrappers(tmp_path: Path) -> None:
    """An ``OptimWrapperDict`` has a learning rate of each wrapper, and its model perhaps no ``loss``."""
    run = _run({'PCK': 0.5})
    step = {'generator.lr': 0.1, 'critic.lr': 0.2, 'loss_g': 1.0, 'time': 1.0, 'data_time': 0.5, 'step': 1}
    run = replace(run, log=[step, run.log[1]])
    assert (run.training('loss_g'), run.held_out('PCK'), run.seconds()) == ([(1, 1.0)], [(1, 0.5)], 0.5)
    assert held_out_metric([run], None) == 'PCK'
    draw_curves([run], 'PCK', {}, tmp_path / 'curves.png')


def test_losses_below_zero_are_drawn(tmp_path: Path) -> None:
    run = _run()
    steps = [{**run.log[0], 'step': step, 'loss': loss} for step, loss in enumerate((-1.0, -2.0, -40.0))]
    pictures = []
    for factor in (1, 2):
        log = [{**step, 'loss': step['loss'] * (factor if step['step'] == 1 else 1)} for step in steps]
        draw_curves([replace(run, log=log)], None, {}, tmp_path / 'curves.png')
        pictures.append(cv2.imread(str(tmp_path / 'curves.png')))
    assert not np.array_equal(*pictures)


def test_a_run_by_iterations_is_refused(tmp_path: Path) -> None:
    (tmp_path / '20260101_000000' / 'vis_data').mkdir(parents=True)
    (tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json').touch()
    (tmp_path / 'iter_8.pth').touch()
    with pytest.raises(UsageError, match=r'no checkpoint of a whole epoch: .* by epochs'):
        read_run('a', tmp_path)


def test_a_resumed_run_has_one_log(tmp_path: Path) -> None:
    """What was trained again after an interruption counts once, as it was the second time."""
    for time, steps in (('20260101_000000', (1, 2, 3)), ('20260101_000100', (3, 4))):
        folder = tmp_path / time / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'config.py').write_text(f'train_cfg = dict(max_epochs=10)\nresume = {steps[0] > 1}\n')
        lines = [{'lr': 0.1, 'loss': float(time[-3]), 'time': 1.0, 'data_time': 0.5, 'step': s} for s in steps]
        if steps[0] == 1:  # of a method whose second pass is rare, the first log after resuming may have less
            lines = [{**line, 'sharpness/L_w_e': 2.0} for line in lines]
        (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    torch.save({}, tmp_path / 'epoch_2.pth')
    torch.save({}, tmp_path / 'epoch_10.pth')
    run = read_run('a', tmp_path)
    assert run.training('loss') == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]
    assert run.seconds() == 2.0
    assert run.last.name == 'epoch_10.pth'
    assert run.epochs_in_words() == '10'


def test_of_several_runs_in_a_folder_the_last_one_counts(tmp_path: Path) -> None:
    for time, epochs in (('20260101_000000', 3), ('20260101_000100', 2)):
        folder = tmp_path / time / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'config.py').write_text(f'train_cfg = dict(max_epochs={epochs + 1})\nresume = False\n')
        lines = [{'PCK': epochs / 10, 'step': epoch + 1} for epoch in range(epochs)]
        lines += [{'lr': 0.1, 'loss': 1.0, 'time': 1.0, 'data_time': 0.5, 'step': epoch + 1} for epoch in range(epochs)]
        (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        for epoch in range(epochs):
            torch.save({}, tmp_path / f'epoch_{epoch + 1}.pth')
        (tmp_path / 'last_checkpoint').write_text(f'/elsewhere/epoch_{epochs}.pth')
    torch.save({}, tmp_path / 'epoch_2-01ab23cd.pth')  # as CheckpointHook publishes it
    run = read_run('a', tmp_path)
    assert run.held_out('PCK') == [(1, 0.2), (2, 0.2)]
    assert (run.last.name, run.epochs_in_words(), run.seconds()) == ('epoch_2.pth', '2 of 3', 1.0)
