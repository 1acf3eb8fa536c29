"""tools/ptq.py and tools/sensitivity.py: from a float checkpoint to tables, checkpoints, a policy, and errors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, set_random_seed

from mm_sharp.analysis.post_training import sensitivity, subject
from mm_sharp.analysis.post_training.policies import float_config, own_policy, quantized_config, read_policy
from mm_sharp.analysis.post_training.proposal import same_everywhere
from mm_sharp.analysis.post_training.subject import Subject
from mm_sharp.cli.options import load_config
from mm_sharp.errors import UsageError, UserError
from mm_sharp.quantization import calibrate, latency
from mm_sharp.quantization.latency import Latency
from tests.mmpose_cases import QUIET
from tests.tiny_data import write_float_and_w4a4
from tests.tool_runs import PLAIN, tool

pytestmark = QUIET
TARGET = {'target': 'onnxruntime'}
FLIP = ['--cfg-options', 'model.test_cfg.flip_test=False']


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people, a float config with a checkpoint, and a quantized one with a checkpoint."""
    folder = tmp_path_factory.mktemp('ptq')
    write_float_and_w4a4(folder, PLAIN, 4)
    low = dict(weight_bit_width=4, act_bit_width=4, scale_init='max')  # which takes no search
    (folder / 'low.py').write_text(f'sharp_quantization = dict(policy={low})\n')
    set_random_seed(0)
    for name, file in (('float', 'f.pth'), ('w4a4', 'q.pth')):
        torch.save({'state_dict': build(Config.fromfile(folder / f'{name}.py')).state_dict()}, folder / file)
    return folder


def build(cfg: Config) -> Any:
    """A config's model; no default scope is left behind that the tools would find."""
    with DefaultScope.overwrite_default_scope('mmpose'):
        return MODELS.build(cfg.model)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    tool(name).main(list(arguments))


@pytest.mark.slow
def test_ptq_gives_the_metrics_of_calibrating_by_hand_and_checkpoints_that_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['--policy', 'low.py', 'w8a16', '--batches', '1', '--bias-correction', '--work-dir', 'out', *FLIP]
    run('ptq', folder, monkeypatch, 'float.py', 'f.pth', *options)
    printed = capsys.readouterr()
    rows = {row['name']: row for row in json.loads((folder / 'out' / 'ptq.json').read_text())['rows']}
    assert list(rows) == ['float', 'low', 'w8a16']
    assert {'coco/AP', 'PCK'} <= rows['low']['metrics'].keys()
    assert not any(' ' in name for name in rows['low']['metrics'])
    assert rows['float']['megabytes'] > rows['w8a16']['megabytes'] > rows['low']['megabytes']
    assert f'{rows["low"]["metrics"]["PCK"]:.4f}' in printed.out
    assert 'Calibrating' in printed.err

    cfg = Config.fromfile(folder / 'out' / 'ptq_low.py')
    assert cfg.load_from == 'out/ptq_low.pth'
    saved = build(cfg)
    saved.load_state_dict(torch.load(folder / 'out' / 'ptq_low.pth', weights_only=True)['state_dict'])
    plain = Config.fromfile(folder / 'float.py')
    plain.model.test_cfg.flip_test = False
    subject = Subject(plain, 'f.pth', batches=1)
    by_hand = build(quantized_config(subject.cfg, read_policy('low.py')))
    by_hand.load_state_dict(torch.load(folder / 'f.pth')['state_dict'], strict=False)
    calibrate(by_hand, subject.batches, bias_correction=True)
    for (name, ours), theirs in zip(saved.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert subject.test(by_hand.eval()) == pytest.approx(rows['low']['metrics'])


@pytest.mark.slow
@pytest.mark.parametrize(
    'mode',
    [['--alone', '--mean-bits', '6'], pytest.param(['--spared', '--size-mb', '0.2'], marks=pytest.mark.slow)],
    ids=' '.join,
)
def test_sensitivity_writes_a_policy_within_the_budget(
    mode: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['--policy', 'low.py', 'w8a8', '--people', '4', '--batches', '1', '--work-dir', mode[0][2:], *mode, *FLIP]
    run('sensitivity', folder, monkeypatch, 'w4a4.py', 'f.pth', *options)
    printed = capsys.readouterr().out
    out = folder / mode[0][2:]
    found = json.loads((out / 'sensitivity.json').read_text())
    assert found['others'] == ('float' if '--alone' in mode else 'low')
    assert (out / 'sensitivity.png').stat().st_size > 10_000
    subject = Subject(Config.fromfile(folder / 'float.py'), 'f.pth', batches=1)
    model: Any = subject.quantized(read_policy(str(out / 'mixed.py')))
    layers = model.quantization.quantized
    assert {layer.name for layer in layers} == {layer['layer'] for layer in found['layers']}
    total = sum(layer.weights for layer in layers)
    if '--alone' in mode:
        assert 4 < sum(layer.weights * layer.policy.weight_bit_width for layer in layers) / total <= 6
    else:
        assert model.quantization.bytes() <= 200_000
    assert re.search(rf'^mixed +{model.quantization.bytes() / 1e6:.3f} ', printed, re.MULTILINE)
    assert all(layer['layer'] in printed for layer in found['layers'])
    assert f'\nTest it: python tools/ptq.py w4a4.py f.pth --policy {mode[0][2:]}/mixed.py\n' in printed
    assert f"_base_ = [the float recipe, '{out}/mixed.py'] and load_from = 'f.pth'" in printed


@pytest.mark.slow
def test_the_target_of_policies_is_that_of_the_proposal_and_no_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers are measured as without it; the proposal and what it is compared with have it, and keep to the budget."""
    low = read_policy(str(folder / 'low.py'))
    (folder / 'low_ort.py').write_text(f'sharp_quantization = dict(policy={dict(low, target="onnxruntime")})\n')
    (folder / 'high.py').write_text(f'sharp_quantization = dict(policy={dict(low, weight_bit_width=8)})\n')
    options = ['--people', '4', '--batches', '1', *FLIP]

    def search(first: str, *budget: str) -> dict[str, Any]:
        policies = ['--policy', f'{first}.py', 'high.py']
        run('sensitivity', folder, monkeypatch, 'float.py', 'f.pth', *policies, '--work-dir', first, *budget, *options)
        return json.loads((folder / first / 'sensitivity.json').read_text())

    plain, with_target = search('low'), search('low_ort', '--size-mb', '0.045')
    assert with_target['value'] == plain['value']
    costs = {layer['layer']: layer['costs'] for layer in plain['layers']}
    for layer in with_target['layers']:
        assert [*layer['costs'].values()] == [*costs[layer['layer']].values()]
    proposed = read_policy('low_ort/mixed.py')
    assert proposed['target'] == 'onnxruntime'
    cfg = Config.fromfile(folder / 'float.py')
    cfg.model.test_cfg.flip_test = False
    subject = Subject(cfg, 'f.pth', batches=1)
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    with DefaultScope.overwrite_default_scope('mmpose'):
        judge, _ = subject.loss(4)
    for name, policy in {'mixed': proposed, 'high': {**same_everywhere(read_policy('high.py')), **TARGET}}.items():
        model: Any = subject.quantized(policy)
        assert model.quantization.points
        assert printed[name][0] == f'{model.quantization.bytes() / 1e6:.3f}'
        assert printed[name][2] == f'{judge(model):.5g}'
        assert (model.quantization.bytes() <= 45_000) == (name == 'mixed')


def test_a_budget_that_cannot_be_kept_is_refused_before_layers_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, 'measure', lambda *args: pytest.fail('layers are measured'))
    options = ['--people', '4', '--batches', '1', '--work-dir', 'few', '--policy', 'low.py', '--mean-bits', '2', *FLIP]
    with pytest.raises(UsageError, match=r'--mean-bits 2: with the fewest bits \(low\) the weights have 4\.0 bits'):
        run('sensitivity', folder, monkeypatch, 'float.py', 'f.pth', *options)


@pytest.mark.slow  # seven models are exported
def test_sensitivity_writes_a_policy_within_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(files: dict[str, Path], only: list[str]) -> list[Latency]:
        """A millisecond for the weights of a layer in integers, 2 for those in float, read off the files."""
        times = {}
        for name, file in files.items():
            weights = [item for item in onnx.load(file).graph.initializer if len(item.dims) in (2, 4)]
            times[name] = sum(1.0 if item.data_type == onnx.TensorProto.INT8 else 2.0 for item in weights)
        return [Latency(only[0], name, t, times['float'] / t, 0, 0) for name, t in times.items()]

    monkeypatch.setattr(latency, 'compare', compare)
    options = ['--policy', 'low.py', '--people', '4', '--batches', '1', '--work-dir', 'time', '--times-float', '1.6']
    run('sensitivity', folder, monkeypatch, 'float.py', 'f.pth', *options, '--runtime', 'openvino', *FLIP)
    printed = capsys.readouterr().out
    found = json.loads((folder / 'time' / 'sensitivity.json').read_text())
    policy = read_policy('time/mixed.py')
    spared = [layer['layer'] for layer in found['layers'] if layer['costs']['low'] > 0]
    count = len(policy.get('skip', ()))
    assert policy['target'] == 'openvino'
    assert {*map(re.escape, spared[:count])} == {pattern[1:-1] for pattern in policy['skip']}
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if re.match('mixed|low|float', line)}
    assert 1.6 <= float(rows['mixed'][4]) < float(rows['low'][4])
    assert float(rows['mixed'][3]) == float(rows['low'][3]) + count
    one_more = float(rows['float'][3]) / (float(rows['mixed'][3]) + 1)
    assert one_more < 1.6 or count == len(spared)
    assert sorted(path.suffix for path in (folder / 'time').iterdir()) == ['.json', '.png', '.py']


def test_the_default_count_of_people_is_at_most_all_there_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    subject = Subject(Config.fromfile(folder / 'float.py'), 'f.pth', batches=1)
    with DefaultScope.overwrite_default_scope('mmpose'):
        (of_all, count), (of_four, four) = subject.loss(128, at_most=True), subject.loss(4)
        assert of_all(subject.float_model) == of_four(subject.float_model)
    assert count == four == 4
    assert capsys.readouterr().err == 'All 4 people of the validation set are judged on\n'
    assert tool('sensitivity').parse_arguments(['float.py', 'f.pth']).people is None


def test_a_metric_of_the_config_can_be_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    subject = Subject(Config.fromfile(folder / 'float.py'), 'f.pth', batches=1)
    expected = subject.test(subject.float_model)['PCK']
    assert subject.metric('PCK', 4)[0](subject.float_model) == pytest.approx(-expected)
    with pytest.raises(UsageError, match=r"--metric pck: no metric of val_evaluator; did you mean 'PCK'\?"):
        subject.metric('pck', 4)[0](subject.float_model)


def test_float_and_quantized_configs_are_made_of_each_other(folder: Path) -> None:
    plain, quantized = Config.fromfile(folder / 'float.py'), Config.fromfile(folder / 'w4a4.py')
    assert own_policy(plain) is None
    assert own_policy(quantized) == read_policy('w4a4')
    assert float_config(quantized).model == plain.model
    assert quantized_config(plain, read_policy('w4a4')).model == quantized.model
    assert quantized_config(quantized, read_policy('w8a8')).model.policy == read_policy('w8a8')
    lazy = float_config(plain)
    lazy.model = dict(type='QuantizedModel', model=plain.model, policy=dict(weight_bit_width=4))
    assert float_config(lazy).model == plain.model


EARLY = [
    ('ptq', ['--policy', 'targets.py'], r"--policy targets\.py: QuantizedModel: target='onnx' is not allowed"),
    ('ptq', ['--policy', 'w8a8', 'unused.py'], r"--policy unused: .*patterns \['nowhere'\] match no layer"),
    ('ptq', ['--policy', 'moving.py', '--learned-rounding'], 'moving: learned rounding needs scales that stay'),
    ('ptq', ['--work-dir', 'f.pth/out'], "the folder 'f.pth/out' cannot be made"),
    ('sensitivity', ['--policy', 'unused.py'], r"--policy unused: .*patterns \['nowhere'\] match no layer"),
    ('sensitivity', ['--policy', 'w8a8_openvino', 'w8a8_onnxruntime'], 'these say onnxruntime and openvino'),
    ('sensitivity', ['--policy', 'w4a4', 'w8a8_tensorrt'], "w4a4: .*target='tensorrt' takes inputs of 8 bits"),
    ('sensitivity', ['--policy', 'w8a16', '--times-float', '2'], 'inputs of 16 bits cannot be exported'),
    ('sensitivity', ['--work-dir', 'f.pth/out'], "the folder 'f.pth/out' cannot be made"),
]


@pytest.mark.parametrize(('name', 'arguments', 'message'), EARLY, ids=[' '.join([n, *a]) for n, a, _ in EARLY])
def test_what_needs_no_checkpoint_is_said_before_one_is_loaded(
    name: str, arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = {'targets': dict(target='onnx'), 'unused': dict(skip=['nowhere'])}
    policies['moving'] = dict(weight_scales='statistics', scale_init='max')
    for file, policy in policies.items():
        (folder / f'{file}.py').write_text(f'sharp_quantization = dict(policy={policy})\n')
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', lambda *args: pytest.fail('a checkpoint is loaded'))
    with pytest.raises(UsageError, match=message) as caught:
        run(name, folder, monkeypatch, 'float.py', 'f.pth', *arguments)
    assert '\n' not in str(caught.value)


def test_a_network_that_cannot_be_traced_is_refused_before_its_checkpoint_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, root: Any) -> None:
        raise TypeError('no proxy')

    monkeypatch.setattr('mm_sharp.quantization.equalization._Tracer.trace', fail)
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', lambda *args: pytest.fail('a checkpoint is loaded'))
    with pytest.raises(UsageError, match=r'--policy w8a8: TopdownPoseEstimator cannot be equalized: .*no proxy'):
        run('ptq', folder, monkeypatch, 'float.py', 'f.pth', '--equalize')


@pytest.mark.parametrize(
    ('name', 'package', 'arguments'),
    [
        ('ptq', 'brevitas', []),
        ('sensitivity', 'brevitas', []),
        ('sensitivity', 'onnxoptimizer', ['--metric', 'PCK']),
        ('sensitivity', 'onnxruntime', ['--policy', 'w8a8', '--times-float', '2']),
    ],
)
def test_a_missing_package_is_named_first(
    name: str, package: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'needs {package}, which cannot be imported.*mm_sharp\[quant\]'):
        run(name, folder, monkeypatch, 'float.py', 'f.pth', *arguments)


BAD = [
    ('ptq', ['f.pth', '--policy', 'w9'], r'--policy w9: no such policy'),
    ('ptq', ['f.pth', '--batches', '0'], '--batches 0: it must be at least 1'),
    ('ptq', ['f.pth', '--learned-rounding', '0'], '--learned-rounding 0: it must be at least 1'),
    ('ptq', ['f.pth', '--policy', 'w4a4', 'w4a4'], 'two of them have the same name'),
    ('ptq', ['none.pth'], r"checkpoint: no checkpoint 'none\.pth'"),
    ('ptq', ['q.pth'], r"'q\.pth' is of a quantized model: take the float model's"),
    ('sensitivity', ['f.pth', '--people', '0'], '--people 0: it must be at least 1'),
    ('sensitivity', ['f.pth', '--people', '9'], '--people 9: the validation set has 4 people only: write --people 4'),
    ('sensitivity', ['f.pth', '--mean-bits', '-1'], '--mean-bits -1: it must be a finite number above 0'),
    ('sensitivity', ['f.pth', '--size-mb', '1', '--mean-bits', '4'], 'not allowed with argument'),
    ('sensitivity', ['f.pth', '--times-float', '1'], '--times-float 1: it must be a finite number above 1'),
    ('sensitivity', ['f.pth', '--latency-ms', '0'], '--latency-ms 0: it must be a finite number above 0'),
    ('sensitivity', ['f.pth', '--latency-ms', '5', '--times-float', '2'], 'not allowed with argument'),
    ('sensitivity', ['f.pth', '--runtime', 'openvino'], 'nothing is timed without --latency-ms or --times-float'),
    ('sensitivity', ['f.pth', '--times-float', '2', '--policy', 'w8a8_tensorrt'], "'tensorrt' cannot be timed here"),
    ('sensitivity', ['f.pth', '--policy', 'float'], '--policy float: give at least one that quantizes'),
    ('sensitivity', ['f.pth', '--spared', '--policy', 'float', 'w4a4'], 'cannot be float'),
    ('sensitivity', ['f.pth', '--cfg-options', 'val_dataloader=None'], 'has no val_dataloader'),
]


@pytest.mark.parametrize(('name', 'arguments', 'message'), BAD, ids=[' '.join([n, *a]) for n, a, _ in BAD])
def test_mistakes_are_errors_of_one_line(
    name: str, arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((UsageError, UserError), match=message) as caught:
        run(name, folder, monkeypatch, 'float.py', *arguments)
    assert '\n' not in str(caught.value)


def test_the_quantized_config_alone_says_what_the_policy_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ptq = tool('ptq')
    for config, expected in (('w4a4.py', {'own': read_policy('w4a4')}), ('float.py', {'w8a8': read_policy('w8a8')})):
        assert ptq.configure(ptq.parse_arguments([config, 'f.pth']))[1] == expected
    assert load_config(ptq.parse_arguments(['w4a4.py', 'f.pth'])).model.type == 'QuantizedModel'


def test_single_layers_are_compared_where_no_policy_skips_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / 'spares.py').write_text("sharp_quantization = dict(policy=dict(skip='^head'))\n")
    sensitivity_tool = tool('sensitivity')
    args = sensitivity_tool.parse_arguments(['float.py', 'f.pth', '--policy', 'low.py', 'spares.py'])
    assert {name: policy['skip'] for name, policy in sensitivity_tool.configure(args)[1].items()} == {
        'low': ['^head'],
        'spares': ['^head'],
    }


def test_the_last_people_of_a_summed_loss_count_as_much_as_all_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimCC's loss is a sum over the batch: of batches of 3 and 1 as of one of 4, but for the batch's size."""
    monkeypatch.chdir(folder)
    found = Subject(Config.fromfile('float.py'), 'f.pth')
    values = []
    for size in (3, 4):
        monkeypatch.setattr(subject, '_BATCH', size)
        judge, people = found.loss(4)
        values.append(judge(found.float_model) / size)
    assert people == 4
    assert values[0] == pytest.approx(values[1], rel=1e-5)
