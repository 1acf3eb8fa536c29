"""Activations between layers are quantized where a runtime needs it, in training as in the file."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from onnx import numpy_helper
from torch import Tensor, nn

from mm_sharp.errors import UserError
from mm_sharp.quantization import CheckpointMismatchError, QuantizationPolicy, calibrate, quantized_model
from mm_sharp.quantization.export import Network, _set_biases_apart, export_onnx
from mm_sharp.quantization.export_check import IntegerCheck, recording
from mm_sharp.quantization.latency import interleaved, onnxruntime_convolutions, openvino_convolutions, openvino_warning
from mm_sharp.quantization.onnx_runtime import for_onnxruntime
from tests.conftest import ROOT
from tests.mmpose_cases import QUIET, Case
from tests.pages import blocks
from tests.quantized_models import (
    DECONV,
    HRNET,
    RLE,
    RTMPOSE,
    SIMCC,
    calibrated,
    distance,
    float_model,
    images,
    output,
    policy,
    samples,
    sized,
)
from tests.quantized_models import SIZE as PICTURE

pytestmark = QUIET
SIZE = (8, 8)


class Block(nn.Module):
    """As ResNet's: a sum that is no module, and a ReLU that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """A stem, two blocks, an attention of channels by a product, a concatenation and the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3), nn.SiLU()
        self.pool = nn.MaxPool2d(2)
        self.first, self.second = Block(), Block()
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.gate = nn.Sigmoid()
        self.tail = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        x = self.first(self.pool(self.act(self.stem(inputs))))
        y = self.second(x)
        y = y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.tail(torch.cat([x, y], 1))


def net(target: str, **changes: Any) -> Any:
    """Quantized to 8 bits and calibrated."""
    torch.manual_seed(0)
    wanted = {**policy(8, 8, target=target, input_size=SIZE), **changes}
    model = quantized_model(Net(), wanted)
    calibrate(model, [{'inputs': images(4, seed, SIZE)} for seed in range(2)])
    return model


def points(model: Any) -> dict[str, str]:
    return dict(model.quantization.points)


def shared(model: Any) -> dict[str, str]:
    return {layer.name: layer.point for layer in model.quantization.layers if layer.point}


# ------------------------------------------------------------------ where
def test_generic_quantizes_the_inputs_of_layers_alone() -> None:
    model = net('generic')
    assert (points(model), shared(model)) == ({}, {})
    assert not any('quantized_' in name for name in model.state_dict())
    assert QuantizationPolicy.from_config({}).target == 'generic'


def test_onnxruntime_quantizes_all_that_is_computed_on_the_way_to_a_convolution() -> None:
    model = net('onnxruntime')
    assert points(model) == {
        'stem.quantized_output': 'signed',
        'act.quantized_output': 'signed',
        'first.conv2.quantized_output': 'signed',
        'first.quantized_output': 'unsigned',
        'second.conv2.quantized_output': 'signed',
        'second.quantized_output': 'unsigned',
        'squeeze.quantized_output': 'signed',
        'gate.quantized_output': 'unsigned',
        'tail.1.quantized_output': 'unsigned',
    }
    # The ReLU in a block is called twice, and the mean and the concatenation are no modules: their reader quantizes.
    assert shared(model) == {
        'first.conv1': 'act.quantized_output',  # pooling changes no value
        'second.conv1': 'first.quantized_output',
        'tail.2': 'tail.1.quantized_output',
    }


@pytest.mark.parametrize(('target', 'kind'), [('openvino', 'unsigned'), ('tensorrt', 'signed')])
def test_the_way_around_a_residual_sum(target: str, kind: str) -> None:
    model = net(target)
    assert points(model) == {'pool.quantized_output': 'signed', 'first.quantized_output': kind}
    assert shared(model) == {'first.conv1': 'pool.quantized_output', 'second.conv1': 'first.quantized_output'}
    assert {layer.input_range for layer in model.quantization.layers} == {'signed', kind}


class Beside(nn.Module):
    """A layer that reads a sum beside a module which passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.beside, self.last = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4, 4))
        self.drop = nn.Dropout(0.1)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        x = self.first(inputs).relu()
        x = x + self.second(x)
        return self.last(self.beside(x) + self.drop(x))


@pytest.mark.parametrize('target', ['onnxruntime', 'openvino'])
def test_a_layer_beside_a_module_that_passes_its_input_on_reads_integers(target: str) -> None:
    torch.manual_seed(0)
    model: Any = quantized_model(Beside(), policy(8, 8, target=target, input_size=SIZE))
    calibrate(model, [{'inputs': images(4, 0, SIZE)}])
    assert points(model)
    taken: dict[str, Tensor] = {}
    for name in shared(model):  # they have no quantizer of their own
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: taken.update({name: args[0]}))
    output(model.eval(), images(16, 5, SIZE))
    assert all(len(tensor.unique()) <= 256 for tensor in taken.values())


class Mixed(nn.ModuleList):
    """As timm's: convolutions of different sizes, each of a part of the channels."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self, inputs.chunk(2, 1), strict=True)], 1)


class MixedByName(nn.ModuleDict):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.values(), inputs.chunk(2, 1), strict=True)], 1)


class Around(nn.Sequential):
    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        return super().forward(inputs)


@pytest.mark.parametrize('named', [False, True])
def test_no_quantizer_is_put_among_children_that_a_forward_runs_over(named: bool) -> None:
    layers = [nn.Conv2d(2, 2, size, padding=size // 2) for size in (3, 5)]
    mixed = MixedByName({'three': layers[0], 'five': layers[1]}) if named else Mixed(layers)
    source = Around(nn.Conv2d(3, 4, 3), nn.ReLU(), mixed, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model: Any = quantized_model(source, policy(8, 8, target='onnxruntime', input_size=SIZE))
    calibrate(model, [{'inputs': images(4, 0, SIZE)}])
    assert points(model)
    assert len(mixed) == 2


def test_layers_of_fewer_bits_quantize_their_input_again() -> None:
    model = net('openvino', act_bit_width=4)
    assert set(points(model)) == {'pool.quantized_output', 'first.quantized_output'}
    assert shared(model) == {}


@pytest.mark.slow
@pytest.mark.parametrize('target', ['onnxruntime', 'openvino', 'tensorrt'])
@pytest.mark.parametrize('case', [HRNET, RTMPOSE], ids=lambda case: case.name)
def test_without_quantizers_the_model_is_the_float_model(case: Case, target: str) -> None:
    """Building compares them, and refuses what differs."""
    assert calibrated(case, weight=8, act=8, target=target).quantization.points


# ------------------------------------------------------------------ what is trained is what runs
def test_both_inputs_of_a_sum_have_few_values() -> None:
    model = net('onnxruntime').eval()
    seen: list[Tensor] = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.second.conv2.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    output(model, images(16, 5, SIZE))
    for tensor in seen:
        assert len(tensor.unique()) <= 256
    plain = net('generic').eval()
    seen.clear()
    plain.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(plain, images(16, 5, SIZE))
    assert len(seen[0].unique()) > 256


def test_scales_of_points_are_trained_unless_they_are_fixed_or_their_host_is() -> None:
    model = net('onnxruntime').train()
    model(images(4, 0, SIZE)).square().sum().backward()
    for name in points(model):
        (scale,) = model.get_submodule(name).parameters()
        assert scale.grad is not None
        assert bool(scale.grad.isfinite().all())
    fixed = net('onnxruntime', act_scales='fixed')
    assert not any(p.requires_grad for name, p in fixed.named_parameters() if 'quantized_output' in name)
    source = Net()
    source.second.requires_grad_(False)
    frozen = quantized_model(source, policy(8, 8, target='openvino', input_size=SIZE))
    trained = {name: p.requires_grad for name, p in frozen.named_parameters() if name.startswith('second.')}
    assert trained
    assert not any(trained.values())


def test_checkpoints() -> None:
    model, other = net('onnxruntime'), net('openvino')
    copy = quantized_model(Net(), policy(8, 8, target='onnxruntime', input_size=SIZE))
    copy.load_state_dict(model.state_dict())
    assert torch.equal(output(copy, images(2, 1, SIZE)), output(model, images(2, 1, SIZE)))
    copy.load_state_dict(Net().state_dict(), strict=False)  # a float model's, to be calibrated
    with pytest.raises(CheckpointMismatchError, match=r'2 activations A8.* makes one with .* 9 activations A8'):
        copy.load_state_dict(other.state_dict(), strict=False)


def test_a_copy_has_quantizers_of_its_own() -> None:
    model = net('openvino').eval()
    inputs = images(2, 1, SIZE)
    before, copy = output(model, inputs), deepcopy(model)
    with torch.no_grad():
        for parameter in copy.first.quantized_output.parameters():
            parameter *= 0.1
    assert torch.equal(output(model, inputs), before)
    assert not torch.equal(output(copy, inputs), before)


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize('target', ['onnxruntime', 'openvino', 'tensorrt'])
def test_rounding_is_learned_on_inputs_that_are_integers_already(target: str) -> None:
    plain, model = net(target), net(target)
    calibrate(model, [{'inputs': images(4, seed, SIZE)} for seed in range(2)], learned_rounding=10)
    names = [layer.name for layer in model.quantization.quantized]
    assert set(shared(model)) & set(names)
    with torch.no_grad():
        for name in names:
            nearest = plain.get_submodule(name).quant_weight()
            steps = (model.get_submodule(name).weight - nearest.value) / nearest.scale
            assert float((steps - steps.round()).abs().max()) < 1e-3
            assert float(steps.abs().max()) < 1.5


@pytest.mark.parametrize('value', ['ort', None, 8, 'ONNXRuntime'])
def test_an_unknown_target_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"target=.* is not allowed: .* one of 'generic', 'onnxruntime'"):
        QuantizationPolicy.from_config({'target': value})


@pytest.mark.parametrize(
    'changes',
    [
        dict(act_bit_width=4),
        dict(first_layers=4),
        dict(layers=[dict(pattern='head', act_bit_width=4)]),
        dict(act_symmetric=False),
        dict(weight_symmetric=False),
    ],
)
def test_tensorrt_takes_int8_without_zero_points(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="target='tensorrt' takes inputs of 8 bits, and no zero points: write"):
        QuantizationPolicy.from_config({'target': 'tensorrt', **changes})
    QuantizationPolicy.from_config({**changes, 'target': 'onnxruntime'})
    QuantizationPolicy.from_config({'target': 'tensorrt', 'weight_bit_width': 4, 'first_layers': 'float'})


@pytest.mark.parametrize(
    'changes', [dict(weight_symmetric=False), dict(layers=[dict(pattern='head', weight_symmetric=False)])]
)
def test_openvino_takes_no_zero_points_of_weights(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="target='openvino' takes no zero points of weights: write policy=") as caught:
        QuantizationPolicy.from_config({'target': 'openvino', **changes})
    assert '\n' not in str(caught.value)
    QuantizationPolicy.from_config({'target': 'openvino', 'act_symmetric': False, 'act_bit_width': 4})


# ------------------------------------------------------------------ the file
@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'target'),
    [
        (RTMPOSE, 'onnxruntime'),
        (SIMCC, 'onnxruntime'),
        *(pytest.param(case, t, marks=pytest.mark.slow) for case, t in ((RTMPOSE, 'tensorrt'), (RLE, 'onnxruntime'))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_file_has_the_models_integers(case: Case, target: str, tmp_path: Path) -> None:
    """SiLUs, ReLU6 and all else that is rewritten compute the same."""
    model = calibrated(case, weight=8, act=8, target=target).eval()
    with torch.no_grad():  # some ReLU6 end within the quantizer's range, and some at its end
        for number, name in enumerate(points(model)):
            if number % 2:
                for parameter in model.get_submodule(name).parameters():
                    parameter *= 1.5
    graph = onnx.load(export_onnx(model, tmp_path / 'x.onnx', 'qcdq', {}))
    check, inputs = IntegerCheck(graph, 'qcdq'), images(2, seed=3)
    with torch.no_grad(), recording(model) as records:
        Network(model)(inputs)
    check.add(inputs.numpy(), records)
    assert {layer.layer for layer in check.layers} >= {f'{name}.act_quant' for name in points(model)}
    assert max(layer.alone.largest for layer in check.layers) <= 1
    assert min(layer.alone.share for layer in check.layers) > 0.998


@pytest.mark.slow
@pytest.mark.parametrize('target', ['generic', 'onnxruntime', 'openvino'])
@pytest.mark.parametrize('act', [4, 8])
def test_biases_of_layers_of_few_bits(target: str, act: int) -> None:
    """Set apart they are added before the output is quantized; they stay where ONNX Runtime computes in integers."""
    model = net(target, weight_bit_width=4, act_bit_width=act)
    inputs, copy = images(2, 7, SIZE), deepcopy(model)
    _set_biases_apart(copy)
    assert torch.allclose(output(copy, inputs), output(model, inputs), atol=1e-5)
    few = {layer.name for layer in model.quantization.quantized if layer.policy.weight_bit_width == 4}
    apart = {name for name in few if copy.get_submodule(name).bias is None}
    assert len(few) > 3
    assert apart == (set() if (target, act) == ('onnxruntime', 8) else few)


@pytest.mark.slow
def test_weights_of_few_bits_are_computed_in_integers(tmp_path: Path) -> None:
    model = calibrated(SIMCC, weight=4, act=8, target='onnxruntime').eval()
    file = export_onnx(model, tmp_path / 'w4a8.onnx', 'qcdq', {})
    fused, of = onnxruntime_convolutions(file)
    assert fused == of > 20
    check = IntegerCheck(onnx.load(file), 'qcdq')
    inputs = images(2, 3)
    with torch.no_grad(), recording(model) as records:
        Network(model)(inputs)
    check.add(inputs.numpy(), records)
    assert all(layer.alone.largest <= 1 and layer.alone.share > 0.99 for layer in check.layers)


@pytest.mark.slow
def test_tensorrt_gets_int8_without_zero_points_and_nothing_between(tmp_path: Path) -> None:
    """Its rules, on the graph: TensorRT itself is not run."""
    model = calibrated(SIMCC, weight=8, act=8, target='tensorrt')
    graph = onnx.load(export_onnx(model, tmp_path / 'x.onnx', 'qcdq', {})).graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    users = {node.output[0]: [n for n in graph.node if node.output[0] in n.input] for node in graph.node}
    for node in graph.node:
        if node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
            assert stored[node.input[2]].dtype == np.int8
            assert not stored[node.input[2]].any()
        if node.op_type == 'QuantizeLinear':
            assert {user.op_type for user in users[node.output[0]]} == {'DequantizeLinear'}
        if node.op_type == 'Add' and not stored.keys() & set(node.input):  # not a bias
            made = {n.output[0]: n.op_type for n in graph.node}
            assert [made[name] for name in node.input].count('DequantizeLinear') == 1
    assert {node.domain for node in graph.node} == {''}


@pytest.mark.parametrize(
    ('limits', 'scale', 'clips'),
    [
        (['low', 'high'], 6 / 255, []),
        (['low', 'high'], 0.02, []),
        (['low', 'high'], 0.03, [0, 200]),
        (['', 'high'], 0.03, [0, 200]),  # clamp(max=6)
        (['low', ''], 0.03, []),  # clamp(min=0)
        (['low'], 0.03, []),
    ],
)
def test_relu6_goes_behind_the_quantizer(limits: list[str], scale: float, clips: list[int]) -> None:
    def constant(name: str, value: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(value, name)

    nodes = [
        onnx.helper.make_node('Clip', ['input', *limits], ['clipped'], name='relu6'),
        onnx.helper.make_node('QuantizeLinear', ['clipped', 'scale', 'zero'], ['integers'], name='q'),
        onnx.helper.make_node('DequantizeLinear', ['integers', 'scale', 'zero'], ['output'], name='dq'),
    ]
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ['n']) for name in ('input', 'output')]
    stored = [constant('low', np.float32(0)), constant('high', np.float32(6)), constant('scale', np.float32(scale))]
    stored.append(constant('zero', np.uint8(0)))
    graph = onnx.helper.make_graph(nodes, 'g', kinds[:1], kinds[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    values = np.linspace(-1, 9, 5000, dtype=np.float32)
    expected = run(model, values)
    rewritten = for_onnxruntime(deepcopy(model))
    onnx.checker.check_model(rewritten)
    kinds_now = [node.op_type for node in rewritten.graph.node]
    assert kinds_now == ['QuantizeLinear', *(['Clip'] if clips else []), 'DequantizeLinear']
    after = {item.name: numpy_helper.to_array(item) for item in rewritten.graph.initializer}
    assert [int(after[n]) for node in rewritten.graph.node if node.op_type == 'Clip' for n in node.input[1:]] == clips
    assert np.array_equal(run(rewritten, values), expected)


def run(model: onnx.ModelProto, values: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run(None, {'input': values})[0]


@pytest.mark.slow
def test_a_float_checkpoint_is_folded_and_loaded() -> None:
    source, model = float_model(SIMCC, seed=1), calibrated(SIMCC, weight=8, act=8, target='onnxruntime')
    model.load_state_dict(source.state_dict(), strict=False)
    calibrate(model, samples(2))
    assert distance(output(model, images()), output(source, images())) < 0.2


# ------------------------------------------------------------------ counted in the runtimes
def _resnet50(cfg: Config) -> None:
    cfg.model.backbone.update(depth=50, stem_channels=8, base_channels=8)
    sized(cfg, 256)


HEATMAP = Case(
    'ResNet50', 'body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py', PICTURE, edit=_resnet50
)
SIMCC50 = Case(
    'ResNet50-SimCC', 'body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py', PICTURE, edit=_resnet50
)
MOBILENET = Case(
    'MobileNetV2', 'body_2d_keypoint/topdown_heatmap/coco/td-hm_mobilenetv2_8xb64-210e_coco-256x192.py', (64, 64)
)
DEMO = Case(
    'demo', str(ROOT / 'configs' / 'demo' / 'simcc_res18-half_demo-128x96.py'), PICTURE, edit=lambda cfg: sized(cfg, 64)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    'case',
    [
        RTMPOSE,
        *(pytest.param(case, marks=pytest.mark.slow) for case in (HEATMAP, SIMCC50, MOBILENET, HRNET, DEMO)),
    ],
    ids=lambda case: case.name,
)
def test_convolutions_are_computed_in_integers(case: Case, tmp_path: Path) -> None:
    """In both runtimes, of a model for ONNX Runtime, and in OpenVINO of one for it."""
    pytest.importorskip('openvino')
    for target in ('onnxruntime', 'openvino'):
        model = calibrated(case, weight=8, act=8, target=target)
        file = export_onnx(model, tmp_path / 'x.onnx', 'qcdq', {})
        # For ONNX Runtime a deconvolution becomes a convolution; all of MMPose's are of the kind that can.
        kinds = ('Conv2d', 'ConvTranspose2d') if target == 'onnxruntime' else ('Conv2d',)
        convolutions = sum(layer.kind in kinds for layer in model.quantization.quantized)
        counts = [openvino_convolutions(file)]
        if target == 'onnxruntime':
            counts.append(onnxruntime_convolutions(file))
        for fused, of in counts:
            assert of == convolutions
            assert fused >= 0.9 * of


@pytest.mark.slow
def test_the_pages_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('openvino')
    config, program = blocks(ROOT / 'docs' / 'deployment.md', 'python')
    (tmp_path / 'config.py').write_text(config)
    assert Config.fromfile(tmp_path / 'config.py').model.policy.target == 'onnxruntime'
    model = calibrated(SIMCC, weight=8, act=8, target='openvino').eval()
    export_onnx(model, tmp_path / 'NAME_qcdq.onnx', 'qcdq', {})
    monkeypatch.chdir(tmp_path)
    batch = images(1).numpy()
    made: dict[str, Any] = {'batch': batch}
    exec(program, made)
    with torch.no_grad():
        for name, expected in zip(('simcc_x', 'simcc_y'), Network(model)(torch.from_numpy(batch)), strict=True):
            assert made[name].shape == tuple(expected.shape)
            if multiplies_bytes():
                assert distance(torch.from_numpy(made[name]), expected) < 0.05
    if not multiplies_bytes():
        pytest.skip('the example ran, but without VNNI OpenVINO 2026.4 is wrong about layers of signed inputs')


def multiplies_bytes() -> bool:
    """Whether this processor has instructions for products of bytes, as far as Linux says."""
    info = Path('/proc/cpuinfo')
    flags = info.read_text().split() if info.exists() else []
    return 'avx2' not in flags or not {'avx512_vnni', 'avx_vnni', 'amx_int8'}.isdisjoint(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'changes', 'right'),
    [
        (RTMPOSE, dict(target='onnxruntime'), True),
        (SIMCC, dict(weight=4, act=4), True),
        (DECONV, dict(weight_symmetric=False), False),
    ],
    ids=lambda value: getattr(value, 'name', str(value)),
)
def test_openvino_is_compared_with_onnx_runtime(
    case: Case, changes: dict[str, Any], right: bool, tmp_path: Path
) -> None:
    """Zero points of weights, which its target refuses, it computes wrongly."""
    pytest.importorskip('openvino')
    if not multiplies_bytes():
        pytest.skip('without VNNI OpenVINO 2026.4 is wrong about layers of signed inputs')
    model = calibrated(case, **{'weight': 8, 'act': 8, **changes}).eval()
    plain, file = (export_onnx(model, tmp_path / f'{f}.onnx', f, {}) for f in ('float', 'qcdq'))
    warning = openvino_warning(plain, file)
    assert (warning == '') is right
    assert right or warning.startswith(f'OpenVINO is wrong about {file}: its outputs are ')


def test_files_take_turns() -> None:
    called: list[str] = []
    times = interleaved([lambda: called.append('a'), lambda: called.append('b')], rounds=2)
    assert ''.join(called) == 'ab' + 2 * 'aaabbb'
    assert [len(taken) for taken in times] == [2, 2]
