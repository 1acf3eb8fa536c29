"""tools/export.py: from a checkpoint to a checked file, what the check notices, and errors of one line."""

from __future__ import annotations

import io
import json
import math
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from onnx import numpy_helper

from mm_sharp.cli import options as cli
from mm_sharp.errors import UsageError, UserError
from mm_sharp.quantization import calibrate, latency
from mm_sharp.quantization.export import Network
from mm_sharp.quantization.export_check import ExportCheck, evaluate, keypoint_distances, predict
from mm_sharp.quantization.export_report import Agreement, ExportReport, LayerAgreement, OutputAgreement
from tests.mmpose_cases import QUIET
from tests.tiny_data import write_float_and_w4a4
from tests.tool_runs import PLAIN, run, tool

pytestmark = QUIET


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people, a float config, a quantized one, and its model after calibration in ``model.pth``."""
    folder = tmp_path_factory.mktemp('export')
    write_float_and_w4a4(folder, PLAIN, 8)
    cfg = Config.fromfile(folder / 'w4a4.py')
    init_default_scope('mmpose')
    model = MODELS.build(cfg.model)
    torch.save({'state_dict': model.state_dict()}, folder / 'uncalibrated.pth')
    torch.save({'state_dict': MODELS.build(Config.fromfile(folder / 'float.py').model).state_dict()}, folder / 'f.pth')
    torch.save({'state_dict': {}}, folder / 'empty.pth')
    _, batches = tool('export').first_samples(cfg.train_dataloader.dataset, 8, 4)
    calibrate(model, batches)
    torch.save({'state_dict': model.state_dict(), 'meta': {'epoch': 1}}, folder / 'model.pth')
    return folder


@pytest.fixture(scope='module')
def exported(folder: Path) -> str:
    """What the tool says of a QCDQ export; its files are in ``work_dirs/w4a4``."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        tool('export').main(['w4a4.py', 'model.pth', '--format', 'qcdq'])
    return said.getvalue()


@pytest.fixture(scope='module')
def model(folder: Path) -> Any:
    """The model that was exported."""
    cfg = Config.fromfile(folder / 'w4a4.py')
    module: Any = tool('export').load_model(cfg, str(folder / 'model.pth'), trust=False)
    return module


@pytest.fixture
def batch(folder: Path) -> dict[str, Any]:
    """The four people of the test set."""
    cfg = Config.fromfile(folder / 'w4a4.py')
    return next(iter(tool('export').first_samples(cfg.test_dataloader.dataset, 4, 4)[1]))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_tool_exports_checks_and_reports(folder: Path, exported: str) -> None:
    assert 'QCDQ in ONNX Runtime against PyTorch, 4 people' in exported
    assert 'The file agrees with PyTorch.' in exported
    results = folder / 'work_dirs' / 'w4a4'
    assert sorted(path.name for path in results.iterdir()) == [
        'w4a4_qcdq.check.json', 'w4a4_qcdq.json', 'w4a4_qcdq.onnx',
    ]  # fmt: skip
    report = json.loads((results / 'w4a4_qcdq.check.json').read_text())
    assert report['agrees'] is True
    assert len(report['layers']) == 23
    assert report['integers']['alone']['equal'] > 0.999
    assert report['metrics'].keys() >= {'coco/AP', 'PCK'}
    assert report['metrics']['coco/AP']['difference'] <= report['tolerance'] == 0.25
    onnx.checker.check_model(onnx.load(results / 'w4a4_qcdq.onnx'))
    constants = json.loads((results / 'w4a4_qcdq.json').read_text())
    assert constants['keypoints']['names'][0] == 'nose'
    assert constants['input']['height'] == 128


@pytest.mark.slow
def test_the_command_line(folder: Path) -> None:
    said = run('tools/export.py', 'w4a4.py', 'model.pth', '--images', 1, '--out', 'program/m.onnx', cwd=folder).stdout
    assert 'QCDQ in ONNX Runtime against PyTorch, 1 people' in said
    assert '1/1' in said  # the progress bar
    assert (folder / 'program' / 'm.onnx').is_file()


@pytest.mark.slow
def test_qonnx_is_exported_and_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    arguments = ['w4a4.py', 'model.pth', '--format', 'qonnx', '--images', '1', '--out', 'new/model.onnx']
    tool('export').main([*arguments, '--cfg-options', 'model.test_cfg.flip_test=False'])
    assert 'QONNX in qonnx against PyTorch, 1 people' in capsys.readouterr().out
    report = json.loads(Path('new/model.check.json').read_text())
    assert (report['agrees'], report['samples'], report['tolerance']) == (True, 1, 1.0)
    assert json.loads(Path('new/model.json').read_text())['flip_test'] is False


@pytest.mark.slow
def test_float_models_are_exported_checked_and_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    tool('export').main(['float.py', 'f.pth', '--format', 'float', '--images', '2', '--out', 'new/float.onnx'])
    said = capsys.readouterr().out
    assert 'FLOAT in ONNX Runtime against PyTorch, 2 people' in said
    assert 'integers of' not in said
    report = json.loads(Path('new/float.check.json').read_text())
    assert (report['agrees'], report['layers'], report['integers']['alone']['values']) == (True, [], 0)
    assert max(output['largest'] for output in report['outputs']) < 1e-3
    assert {node.op_type for node in onnx.load('new/float.onnx').graph.node}.isdisjoint({'QuantizeLinear', 'Quant'})
    picture = next(folder.rglob('*.png'))
    assert tool('draw_keypoints').main(['new/float.onnx', str(picture), '--out', 'new/drawn.png']) in (None, 0)
    assert Path('new/drawn.png').is_file()


@pytest.mark.slow
def test_the_benchmark_compares_with_the_same_model_in_float(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(latency, 'compare', partial(latency.compare, rounds=2))
    monkeypatch.setattr(latency, 'openvino_warning', lambda plain, file: f'{plain.name}, {file.name}')
    arguments = ['w4a4.py', 'model.pth', '--packed', '--images', '2', '--out', 'bench/m_qcdq.onnx']
    tool('export').main([*arguments, '--benchmark'])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    rows = [line for line in lines if line.startswith(('ONNX Runtime,', 'OpenVINO,'))]
    assert [row.split(',')[1].split()[0] for row in rows] == ['float', 'qcdq'] * (len(rows) // 2)
    assert rows[0].endswith('1.00  0 of 21')
    assert ('warning: m_float.onnx, m_qcdq.onnx\n' in said.err) is ('openvino' in latency.installed())
    sizes = [line.split()[:2] for line in lines if ' MB, coco/AP ' in line]
    assert [name for name, _ in sizes] == ['float:', 'qcdq:']
    assert float(sizes[0][1]) > 2 * float(sizes[1][1])
    stored = onnx.load('bench/m_qcdq.onnx').graph.initializer  # packed, checked and measured
    assert sum(item.data_type == onnx.TensorProto.INT4 for item in stored) == 20  # all but the first and the last two
    assert len(json.loads(Path('bench/m_qcdq.latency.json').read_text())) == len(rows)
    assert Path('bench/m_float.onnx').is_file()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_passed(
    folder: Path, exported: str, model: Any, batch: dict[str, Any]
) -> None:
    """One scale is wrong: the layer behind it is named."""
    graph = onnx.load(folder / 'work_dirs' / 'w4a4' / 'w4a4_qcdq.onnx')
    weights = next(
        n for n in graph.graph.node if n.op_type == 'DequantizeLinear' and 'layer2.0/conv1/weight_quant' in n.name
    )
    scale = next(item for item in graph.graph.initializer if item.name == weights.input[1])
    scale.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(scale), scale.name))
    onnx.save(graph, folder / 'wrong.onnx')
    check = ExportCheck(model, folder / 'wrong.onnx')
    check.add(batch)
    report = check.report([{'type': 'PCKAccuracy', 'thr': 0.2, 'norm_item': 'bbox'}], {})
    wrong = [layer.layer for layer in report.layers if layer.alone.share < 0.999]
    assert wrong == ['backbone.layer2.0.conv2.input_quant']
    assert any('of the integers are equal' in fault for fault in report.faults())


@pytest.mark.slow
def test_a_disagreement_ends_with_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    module = tool('export')
    report = ExportReport('model.onnx', 'qcdq', 4, [layer(equal=900)], [], [[0.0]], {'AP': (0.5, 0.1)})
    monkeypatch.setattr(module, 'export', lambda *args: report)
    with pytest.raises(SystemExit) as caught:
        module.main(['w4a4.py', 'model.pth'])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert 'model.onnx does not agree with PyTorch: given the same input, only 90.00% of the integers' in message
    assert 'AP is 0.1000 and in PyTorch 0.5000 (they may differ by 0.25)' in message
    assert json.loads(Path('model.check.json').read_text())['agrees'] is False


# -------------------------------------------------------------------- the judgement
def layer(equal: int = 1000, largest: int = 0) -> LayerAgreement:
    return LayerAgreement('conv.input_quant', Agreement(1000, 500, 9), Agreement(1000, equal, largest))


@pytest.mark.parametrize(
    ('changes', 'fault'),
    [
        ({}, ''),
        ({'layers': [layer(equal=999, largest=1)]}, ''),
        ({'layers': [layer(equal=998, largest=1)]}, 'only 99.80% of the integers'),
        ({'layers': [layer(equal=999, largest=2)]}, 'conv.input_quant: given the same input, integers differ by 2'),
        ({'metrics': {'AP': (0.5, 0.501)}}, ''),
        ({'metrics': {'AP': (0.5, 0.5011)}}, 'AP is 0.5011 and in PyTorch 0.5000 (they may differ by 0.001)'),
        ({'metrics': {'AP': (0.5, 0.51)}, 'samples': 100}, ''),
        ({'metrics': {'AP': (0.5, 0.511)}, 'samples': 100}, 'they may differ by 0.01'),
        ({'metrics': {'EPE': (20.0, 20.01)}}, ''),
        ({'metrics': {'EPE': (20.0, 20.1)}}, 'EPE is 20.1000'),
        ({'metrics': {'AP': (math.nan, math.nan)}}, ''),
        ({'metrics': {'AP': (0.5, math.nan)}}, 'AP is nan'),
        ({'outputs': [OutputAgreement('heatmaps', math.inf, 0, 1)]}, 'heatmaps is not finite'),
        # Nine of ten within a pixel, whatever the metrics.
        ({'distances': [[0.5] * 9 + [50.0]], 'metrics': {'AP': (0.5, 0.5)}}, ''),
        ({'distances': [[0.5] * 8 + [50.0] * 2], 'metrics': {'AP': (0.5, 0.5)}}, 'only 80.0% of the keypoints are wi'),
        ({'distances': [[math.nan] + [0.0] * 20]}, 'only 95.2% of the keypoints are within 1 pixel'),
        ({'distances': [[50.0] * 17], 'metrics': {'PCK': (0.0, 0.0)}}, 'only 0.0% of the keypoints are within 1 pixel'),
        ({'metrics': {'AP': (0.0, 0.0)}}, ''),
    ],
)
def test_tolerances(changes: dict[str, Any], fault: str) -> None:
    given: dict[str, Any] = {
        'layers': [layer()], 'outputs': [], 'distances': [[0.0]], 'metrics': {}, 'samples': 5000, **changes,
    }  # fmt: skip
    report = ExportReport(file='x', file_format='qcdq', **given)
    assert ''.join(report.faults()).startswith(fault) if not fault else fault in report.faults()[0]
    assert report.as_dict()['agrees'] is (not fault)
    assert bool(report.faults()) is bool(fault)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('metrics', 'named'),
    [
        ({'AP': (0.5, 0.5)}, ''),
        ({'AP': (0.0, 0.0), 'PCK': (0.3, 0.3)}, 'AP'),
        ({'AP': (0.0, 0.0), 'PCK': (math.nan, math.nan)}, 'AP, PCK'),
        ({'coco/AP': (-1.0, -1.0), 'coco/AP (L)': (-1.0, -1.0)}, 'coco/AP'),
        ({'AP': (0.0, 0.5)}, ''),  # a fault
    ],
)
def test_metrics_that_say_nothing(
    metrics: dict[str, Any],
    named: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = ExportReport('model.onnx', 'qcdq', 5000, [layer()], [], [[0.0]], metrics)
    assert [warning.partition(' of both')[0] for warning in report.warnings()] == ([named] if named else [])
    assert report.as_dict()['warnings'] == report.warnings()
    if named:
        monkeypatch.chdir(folder)
        module = tool('export')
        monkeypatch.setattr(module, 'export', lambda *args: report)
        module.main(['w4a4.py', 'model.pth'])
        said = capsys.readouterr()
        assert f'warning: {named} of both programs is 0 or not a number, which says nothing' in said.err
        assert 'The file agrees with PyTorch.' in said.out


@pytest.mark.parametrize(
    ('layers', 'told'), [([layer()], True), ([layer(equal=900)], False), ([], False)], ids=['right', 'wrong', 'float']
)
def test_what_to_do_is_said_where_the_layers_are_right(layers: list[LayerAgreement], told: bool) -> None:
    report = ExportReport('x', 'qcdq', 128, layers, [], [[0.5] * 8 + [50.0] * 2], {})
    assert ('fine-tune it, calibrate it on more batches' in report.faults()[-1]) is told


def test_differences_of_outputs() -> None:
    agreement = OutputAgreement('y')
    agreement.add(np.array([1.0, -2.0, np.nan], np.float32), np.array([1.5, -2.0, np.nan], np.float32))
    assert agreement.largest == math.inf  # not a number is no agreement
    agreement = OutputAgreement('y')
    agreement.add(np.array([1.0, -2.0], np.float32), np.array([1.5, -2.0], np.float32))
    assert (agreement.largest, agreement.low, agreement.high) == (0.5, -2.0, 1.0)


def test_the_table_marks_the_row_that_is_not_judged() -> None:
    rows = ExportReport('x', 'qcdq', 4, [layer()], [], [[0.0]], {}).table().splitlines()
    assert [row.split('  ')[0] for row in rows if row.endswith('(not judged)')] == ['whole network']


def test_outputs_that_say_nothing() -> None:
    agreement = OutputAgreement('heatmaps')
    for _ in range(2):
        agreement.add(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    report = ExportReport('x', 'qcdq', 4, [layer()], [agreement], [[0.0]], {'AP': (0.5, 0.5)})
    assert report.warnings()[0].startswith('heatmaps: the same for all 4 people, so that both programs agree says')
    agreement.add(np.array([[1, 1, 2]], np.float32), np.ones((1, 3), np.float32))
    assert report.warnings() == []
    assert report.as_dict()['outputs'][0]['varies'] is True


def test_predictions_from_outputs_are_the_models_own(model: Any, batch: dict[str, Any]) -> None:
    data = model.data_preprocessor(deepcopy(batch), False)
    inputs, samples = data['inputs'], data['data_samples']
    assert model.test_cfg.flip_test
    with torch.no_grad():
        own = model.predict(inputs, deepcopy(samples))
        outputs = [[o.numpy() for o in Network(model)(x)] for x in (inputs, inputs.flip(-1))]
    before = deepcopy(outputs)
    found = predict(model, outputs, inputs, samples)
    for one, other in zip(own, found, strict=True):
        assert np.array_equal(one.pred_instances.keypoints, other.pred_instances.keypoints)
        assert np.array_equal(one.pred_instances.keypoint_scores, other.pred_instances.keypoint_scores)
    assert 'pred_instances' not in samples[0]
    assert all(np.array_equal(a, b) for x, y in zip(before, outputs, strict=True) for a, b in zip(x, y, strict=True))
    assert 'extract_feat' not in vars(model)
    assert keypoint_distances(own, found).shape == (4, 17)
    found[0].pred_instances.keypoints[0, 3, 0] += found[0].metainfo['input_scale'][0] / 96  # a pixel of the input
    distances = keypoint_distances(own, found)
    assert distances[0, 3] == pytest.approx(1.0, abs=1e-4)
    assert np.count_nonzero(distances > 1e-6) == 1


def test_metrics_judge_only_the_pictures_that_were_looked_at(folder: Path, model: Any, batch: dict[str, Any]) -> None:
    cfg = Config.fromfile(folder / 'w4a4.py')
    dataset, _ = tool('export').first_samples(cfg.test_dataloader.dataset, 4, 4)
    samples = deepcopy(batch['data_samples'][:2])
    for sample in samples:
        sample.pred_instances = deepcopy(sample.gt_instances)
        sample.pred_instances.keypoint_scores = np.ones((1, 17), np.float32)
    values = evaluate(cfg.test_evaluator, dataset.metainfo, samples)
    assert values['coco/AP'] == pytest.approx(1.0)  # 0.5 or less, were the other two taken for missed
    assert values['PCK'] == 1.0
    assert cfg.test_evaluator[0].ann_file.endswith('person_keypoints_val.json')


# -------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['w4a4.py', 'model.pth', '--format', 'onnx'], "invalid choice: 'onnx'"),
        (['w4a4.py', 'model.pth', '--format', 'float', '--benchmark'], '--benchmark compares qcdq with float'),
        (['w4a4.py', 'model.pth', '--format', 'qonnx', '--packed'], '--packed is of qcdq'),
        (
            ['float.py', 'empty.pth', '--format', 'float'],
            "'empty.pth': the checkpoint is not of this model",
        ),
        (['w4a4.py', 'model.pth', '--images', '0'], '--images 0: it must be at least 1'),
        (['w4a4.py', 'model.pth', '--out', 'model.pth'], "--out 'model.pth': the name must end in .onnx"),
        (['none.py', 'model.pth'], "no config file 'none.py'"),
        (['w4a4.py', 'none.pth'], "checkpoint: no checkpoint 'none.pth'"),
        (['float.py', 'f.pth'], 'is a float model: write --format float, or quantize it by a fragment'),
        (['w4a4.py', 'f.pth'], 'the model has not been calibrated'),
        (['w4a4.py', 'uncalibrated.pth'], 'the model has not been calibrated'),
        (
            ['w4a4.py', 'model.pth', '--cfg-options', 'sharp_quantization.policy.weight_bit_width=8'],
            'the checkpoint is of',
        ),
        (['w4a4.py', 'model.pth', '--cfg-options', 'test_dataloader=None'], 'there is nothing to check the export on'),
    ],
)
def test_mistakes_are_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((UsageError, UserError)) as caught:
        tool('export').main(arguments)
    assert message in str(caught.value)


def test_a_missing_runtime_is_named_before_anything_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UsageError, match=r'onnxruntime, which cannot be imported.*pip install mm_sharp\[quant\]'):
        tool('export').main(['w4a4.py', 'model.pth'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--packed', '--cfg-options', 'sharp_quantization.policy.weight_bit_width=8'], 'packed=True changes nothing'),
        (['--cfg-options', 'sharp_quantization.policy.act_bit_width=16'], 'have inputs of 16 bits, which QCDQ cannot'),
        (['--cfg-options', 'sharp_quantization.policy.target=onnx'], "target='onnx' is not allowed"),
        (['--cfg-options', 'test_dataloader.dataset.pipeline=[]'], 'the test pipeline has no GetBBoxCenterScale'),
        (['--out', 'model.pth/x.onnx'], "the folder 'model.pth' cannot be made"),
    ],
)
def test_what_needs_no_checkpoint_is_said_before_one_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    refuse = classmethod(lambda *args, **kwargs: pytest.fail('a checkpoint is loaded'))
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', refuse)
    with pytest.raises((UsageError, UserError)) as caught:
        tool('export').main(['w4a4.py', 'model.pth', *arguments])
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_usage_errors_end_with_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['tools/export.py', 'float.py', 'f.pth'])
    assert cli.run_tool(tool('export').main) == 2
    message = capsys.readouterr().err
    assert message.startswith('export.py: error: model=TopdownPoseEstimator is a float model')
    assert message.count('\n') == 1
