"""tools/analyze_sharpness.py: from checkpoints to a table, files and a picture, and errors of one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.sharpness import report
from mm_sharp.analysis.sharpness.loading import Samples, load_samples
from mm_sharp.analysis.sharpness.measure import Findings, Settings
from mm_sharp.analysis.sharpness.measures import BallSharpness, Eigenvalues, Trace
from mm_sharp.analysis.sharpness.report import Entry, draw, row, table
from mm_sharp.analysis.tables import csv_text, write_json
from mm_sharp.errors import UsageError
from tests.mmpose_cases import QUIET
from tests.sharpness import OPTIONS
from tests.tiny_data import NARROW_RECIPE, draw_coco
from tests.tool_runs import PLAIN, Tools, tool

pytestmark = QUIET

SAM = PLAIN.with_name('simcc_res18-half_sam_demo-128x96.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of 8 drawn people and weights: ``a.pth``, ``b.pth`` (twice a's), and one of another width."""
    folder = tmp_path_factory.mktemp('sharp')
    data = draw_coco(folder / 'people')
    for name, base, width in (('plain', PLAIN, 4), ('sam', SAM, 4), ('wide', PLAIN, 8)):
        (folder / f'{name}.py').write_text(NARROW_RECIPE.format(base=base, data=data, width=width))
    with DefaultScope.overwrite_default_scope('mmpose'), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, config in (('a', 'plain'), ('wide', 'wide')):
            model = MODELS.build(Config.fromfile(folder / f'{config}.py').model)
            torch.save({'state_dict': model.state_dict(), 'meta': {'epoch': 3}}, folder / f'{name}.pth')
    state = torch.load(folder / 'a.pth', weights_only=True)['state_dict']
    head = {key: value * 2 if key.startswith('head.mlp') else value for key, value in state.items()}
    torch.save(head, folder / 'b.pth')
    return folder


@pytest.fixture
def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    return Tools(folder, monkeypatch, capsys)


def analyze(folder: Path, patch: pytest.MonkeyPatch, *arguments: object) -> list[Entry]:
    """What the tool measures, without its files."""
    patch.chdir(folder)
    module = tool('analyze_sharpness')
    return list(module.analyze(module.parse_arguments([str(argument) for argument in arguments])))


@pytest.mark.slow
def test_two_checkpoints_of_two_configs(folder: Path, tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    names = ('--names', 'base', 'sam', '--landscape', '1d', '2d', '--out-dir', 'out')
    # The second one's config differs in the optimizer alone, so that both see the same pictures.
    tools('analyze_sharpness', 'plain.py', 'a.pth', 'sam.py:b.pth', *OPTIONS, *names)
    content = json.loads((folder / 'out' / 'sharpness.json').read_text())
    first, second = content['checkpoints']
    assert [(c['name'], c['config'], c['epoch']) for c in (first, second)] == [
        ('base', 'plain.py', 3),
        ('sam', 'sam.py', 0),
    ]
    assert first['samples']['count'] == 3
    assert first['samples']['available'] == 8
    assert first['samples']['dataset'] == 'CocoDataset annotations/person_keypoints_train.json'
    assert first['samples']['digest'] == second['samples']['digest']
    assert 'KLDiscretLoss' in first['loss_name']
    assert first['averaging'] == 'sum over the batch'
    assert first['parameters'] == first['all_parameters']
    for found in (first, second):
        assert found['line'][1] == pytest.approx(found['loss'])
        assert found['plane'][1] == found['line']
        assert found['eigenvalues']['residuals'][0] <= 0.3 * abs(found['eigenvalues']['values'][0])
        assert found['balls'][0]['ascent'] >= found['balls'][0]['one_step'] > 0
    assert first['loss'] != second['loss']
    assert content['settings']['seed'] == 0
    with (folder / 'out' / 'sharpness.csv').open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row['name'] for row in rows] == ['base', 'sam']
    assert float(rows[0]['sharpness_0.05']) == first['balls'][0]['one_step']
    assert float(rows[1]['eigenvalue_1']) == second['eigenvalues']['values'][0]
    assert rows[0]['derivatives'] == 'exact'
    assert cv2.imread(str(folder / 'out' / 'landscape.png')).shape[1] > 500


@pytest.mark.slow
def test_the_batch_size_and_the_precision_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size, dtype in ((3, 'float32'), (2, 'float64'), (1, 'float64')):
        options = ('--batch-size', size, '--dtype', dtype, '--eigenvalues', 0, '--landscape', 'none')
        (entry,) = analyze(folder, monkeypatch, 'plain.py', 'a.pth', *OPTIONS, *options)
        cells = row(entry)
        found.append([cells[name] for name in ('loss', 'gradient_norm', 'trace', 'sharpness_0.05', 'ascent_0.05')])
    assert found[1] == pytest.approx(found[2], rel=1e-9)
    assert found[0] == pytest.approx(found[2], rel=2e-3)


def test_held_out_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ('--split', 'val', '--samples', 4, '--eigenvalues', 0, '--trace-draws', 0)
    (entry,) = analyze(folder, monkeypatch, 'plain.py', 'a.pth', *OPTIONS, *options)
    assert entry.samples.dataset.endswith('person_keypoints_val.json')
    assert (len(entry.samples), entry.samples.split) == (4, 'val')
    assert entry.findings.loss > 0


def test_samples_go_by_the_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cfg = Config.fromfile('plain.py')
    with prepared(cfg):
        few, more, other = (load_samples(cfg, 'train', n, seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
        ids = [[row['data_samples'].id for row in found.rows] for found in (few, more, other)]
    assert ids[1][:3] == ids[0] != ids[2]
    assert len({*ids[1]}) == 5
    assert few.digest != other.digest
    assert [size for size, _ in more.batches(2)] == [2, 2, 1]


def toy_entries() -> list[Entry]:
    """Figures of two models, one measured on other samples, with what is not there or not finite."""
    nan = float('nan')
    ball = BallSharpness(0.1, nan, None, 0)
    findings = Findings(
        *(1.0, 'L', 'mean over the batch', 0.5, 10, 12, False, None, None, [ball], {}, [1.0, 2.0], [], ['slow'], {}),
    )
    values = Eigenvalues([3.0], [0.1], 1e-3, 20, torch.ones(1, 10))
    full = {**vars(findings), 'eigenvalues': values, 'trace': Trace(7.0, 1.0, 2), 'surrogate': True}
    full.update(differences={0.1: 2.5}, plane=[[1.0, nan], [1.0, 1.0]], line=[1.0, 1e9], remarks=[])
    data = [Samples([1, 2], list, 'people', 'train', 0, 9, digest) for digest in 'ab']
    return [
        Entry('x', 'x.py', 'x.pth', 1, data[0], findings),
        Entry('y', 'y.py', 'y.pth', 2, data[1], Findings(**full)),
    ]


def test_tables_say_what_is_missing_and_what_differs(tmp_path: Path) -> None:
    entries, settings = toy_entries(), Settings(points=2)
    lines = table(entries).splitlines()
    (eigenvalue,) = [line for line in lines if 'eigenvalue 1' in line]
    assert eigenvalue.split() == ['Hessian', 'eigenvalue', '1', '-', '3*']
    (gradient,) = [line for line in lines if line.startswith('gradient')]
    assert gradient.split()[-2:] == ['0.5', '0.5*']
    (error,) = [line for line in lines if 'standard error' in line]
    assert error.split()[-1] == '1'
    assert any('NOT the same samples' in line for line in lines)
    assert 'x: slow' in lines
    write_json(tmp_path / 'x.json', report.content(entries, settings, {}))
    content = json.loads((tmp_path / 'x.json').read_text())
    assert content['checkpoints'][1]['plane'] == [[1.0, None], [1.0, 1.0]]
    assert content['checkpoints'][1]['differences'] == [{'rho': 0.1, 'curvature': 2.5}]
    assert content['checkpoints'][0]['trace'] is None
    (tmp_path / 'x.csv').write_text(csv_text([*map(row, entries)]))
    with (tmp_path / 'x.csv').open() as stream:
        first, second = csv.DictReader(stream)
    assert (first['trace'], second['trace'], second['derivatives']) == ('', '7.0', 'straight-through surrogate')
    draw(tmp_path / 'x.png', entries, settings)
    assert cv2.imread(str(tmp_path / 'x.png')) is not None


# -------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['plain.py', 'a.pth', 'a.pth'], 'is the name of two checkpoints: give each its own with --names'),
        (['plain.py', 'a.pth', 'b.pth', '--names', 'x', 'x'], "'x' is the name of two"),
        (['plain.py', 'a.pth', '--names', 'x', 'y'], '2 names for 1 checkpoints'),
        (['plain.py', 'a.pth', '--samples', 9], '--samples 9: the training set has 8 samples only: write --samples 8'),
        (['plain.py', 'gone.pth'], "no checkpoint 'gone.pth'"),
        (['gone.py', 'a.pth'], "no config file 'gone.py'"),
        (['plain.py', 'gone.py:a.pth'], "no config file 'gone.py'"),
        (
            ['plain.py', 'a.pth', 'wide.pth', '--samples', 2],
            "cannot use the checkpoint 'wide.pth': the checkpoint is not of this model",
        ),
        (['plain.py', 'code.pth'], "cannot read the checkpoint 'code.pth': the checkpoint holds more than weights"),
        (['plain.py', 'nan.pth'], 'the loss is nan at the weights of the checkpoint'),
        (['plain.py', 'a.pth', '--trace-draws', 1], '--trace-draws 1: one draw has no standard error'),
        (['plain.py', 'a.pth', '--rho', 0], '--rho 0: it must be a finite number above 0'),
        (['plain.py', 'a.pth', '--rho', 0.1, 0.1], '--rho 0.1 0.1: the same value twice'),
        (
            ['plain.py', 'a.pth', '--tolerance', 1e-6],
            '--tolerance 1e-06: with --dtype float32 it must be at least 1e-05',
        ),
        (['plain.py', 'a.pth', '--points', 1], '--points 1: it must be at least 2'),
        (['plain.py', 'a.pth', '--landscape', 'none', '1d'], '--landscape: none does not go with others'),
        (['plain.py', 'a.pth', '--cfg-options', 'train_dataloader.dataset.data_root=gone'], "no data: 'gone/"),
        (['plain.py', 'a.pth', '--cfg-options', 'train_dataloader=None'], 'the config has no train_dataloader'),
        (['plain.py', 'a.pth', '--split', 'val', '--cfg-options', 'val_dataloader=None'], 'no val_dataloader'),
    ],
)
def test_mistakes_are_one_line(folder: Path, tools: Tools, arguments: list[Any], said: str) -> None:
    state = torch.load(folder / 'a.pth', weights_only=True)['state_dict']
    torch.save({key: value * float('nan') for key, value in state.items()}, folder / 'nan.pth')
    torch.save({'state_dict': state, 'more': UsageError('x')}, folder / 'code.pth')
    assert said in tools('analyze_sharpness', *arguments, code=2)
