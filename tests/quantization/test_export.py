"""Quantized models as ONNX: the files say what PyTorch computes, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mm_sharp.errors import UserError
from mm_sharp.quantization import export
from mm_sharp.quantization.deployment import codec_constants, deployment_constants
from mm_sharp.quantization.export import METADATA_KEY, Network, export_onnx, output_names
from mm_sharp.quantization.export_check import IntegerCheck, recording
from mm_sharp.quantization.onnx_graph import activation_points
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import DECONV, HRNET, RLE, RTMPOSE, SIMCC, calibrated, float_model, images, quantized

pytestmark = QUIET
ARCHITECTURES = (SIMCC, *(pytest.param(case, marks=pytest.mark.slow) for case in (HRNET, RLE, RTMPOSE)))
OUTPUTS = {
    SIMCC.name: ['simcc_x', 'simcc_y'],
    HRNET.name: ['heatmaps'],
    RLE.name: ['keypoints'],
    RTMPOSE.name: ['simcc_x', 'simcc_y'],
}
PIPELINE = [
    {'type': 'LoadImage'},
    {'type': 'GetBBoxCenterScale', 'padding': 1.5},
    {'type': 'mmpose.TopdownAffine', 'input_size': (64, 64)},
    {'type': 'PackPoseInputs'},
]
META = {
    'dataset_name': 'stick',
    'keypoint_id2name': {0: 'head', 1: 'foot'},
    'keypoint_colors': np.array([[255, 0, 0], [0, 255, 0]]),
    'skeleton_links': [(0, 1)],
    'skeleton_link_colors': np.array([[0, 0, 255]]),
    'flip_indices': [0, 1],
}


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Module, Path]]:
    """A calibrated model and its file, made once for each case and form."""
    made: dict[Any, tuple[nn.Module, Path]] = {}

    def make(case: Case, file_format: str = 'qcdq', **policy: Any) -> tuple[nn.Module, Path]:
        if case is RLE:  # whose one fully connected layer is its last: as few bits as the others
            policy.setdefault('last_layers', 'same')
        key = (case.name, file_format, *policy.items())
        if key not in made:
            model = calibrated(case, **policy).eval()
            file = tmp_path_factory.mktemp('onnx') / f'{case.name}.onnx'
            constants = deployment_constants(model, PIPELINE, META, 'model')
            made[key] = model, export_onnx(model, file, file_format, constants)
        return made[key]

    return make


def outputs_of(model: nn.Module, inputs: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in Network(model)(inputs)]


def integers(model: nn.Module, file: Path, file_format: str, count: int = 2) -> IntegerCheck:
    """Both programs' integers, compared on noise."""
    check = IntegerCheck(onnx.load(file), file_format)
    inputs = images(count, seed=3)
    with torch.no_grad(), recording(model) as records:
        Network(model)(inputs)
    check.add(inputs.numpy(), records)
    return check


@pytest.mark.slow
@pytest.mark.parametrize('case', ARCHITECTURES, ids=lambda case: case.name)
def test_onnx_runtime_computes_what_pytorch_does(case: Case, exported: Any) -> None:
    model, file = exported(case)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ('input', ['batch', 3, 64, 64], 'tensor(float)')
    assert [output.name for output in session.get_outputs()] == OUTPUTS[case.name]
    for count in (1, 3):  # the batch's size is free
        inputs = images(count, seed=3)
        theirs = session.run(None, {'input': inputs.numpy()})
        ours = outputs_of(model, inputs)
        for one, other, declared in zip(ours, theirs, session.get_outputs(), strict=True):
            assert other.shape == one.shape
            assert declared.shape == ['batch', *one.shape[1:]]
            # A flip or two in a network of a few channels; without one the difference is 1e-7.
            assert np.abs(one - other).max() <= 0.05 * np.abs(one).max()


@pytest.mark.parametrize('case', ARCHITECTURES, ids=lambda case: case.name)
def test_the_integers_of_all_layers_are_pytorchs(case: Case, exported: Any) -> None:
    model, file = exported(case)
    check = integers(model, file, 'qcdq')
    layers = [layer.name for layer in model.quantization.quantized]
    assert sorted(layer.layer for layer in check.layers) == sorted(f'{name}.input_quant' for name in layers)
    for layer in check.layers:
        assert layer.alone.values == layer.network.values > 0
        assert layer.alone.largest <= 1
        assert layer.alone.share > 0.998
    values, equal = (sum(getattr(layer.network, name) for layer in check.layers) for name in ('values', 'equal'))
    assert equal > 0.99 * values


@pytest.mark.slow
def test_qonnx_files_execute_and_agree(exported: Any) -> None:
    model, file = exported(DECONV, 'qonnx')  # SimCC: tests/quantization/test_export_tool.py
    graph = onnx.load(file)
    assert 'Quant' in {node.op_type for node in graph.graph.node}
    check = integers(model, file, 'qonnx', count=1)
    assert len(check.layers) == len(model.quantization.quantized)
    assert max(layer.alone.largest for layer in check.layers) <= 1
    assert min(layer.alone.share for layer in check.layers) > 0.999


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Positional args are being deprecated:FutureWarning')  # Brevitas 0.13.4 to torch
@pytest.mark.filterwarnings('ignore:Computing zero point of output accumulator')
def test_zero_points_and_unfolded_batchnorms_are_exported(exported: Any) -> None:
    policy = {'act_symmetric': False, 'weight_symmetric': False, 'fold_batchnorm': False}
    model, file = exported(SIMCC, weight=8, act=8, **policy)
    points = activation_points(onnx.load(file))
    assert any(point.zero_point != 0 for point in points)
    check = integers(model, file, 'qcdq')
    assert max(layer.alone.largest for layer in check.layers) <= 1
    assert min(layer.alone.share for layer in check.layers) > 0.998


def test_layers_of_few_bits_add_their_bias_where_it_is_not_rounded(exported: Any) -> None:
    _, file = exported(SIMCC)
    layers = [node for node in onnx.load(file).graph.node if node.op_type in ('Conv', 'ConvTranspose', 'Gemm')]
    assert {node.op_type for node in layers} == {'Conv', 'ConvTranspose'}
    with_bias = [node.name for node in layers if len(node.input) == 3]
    assert len(with_bias) == 1  # the first layer, which has 8 bits
    assert 'conv1' in with_bias[0]


def test_weights_are_stored_as_integers(exported: Any) -> None:
    model, file = exported(SIMCC)
    weights = sum(layer.weights for layer in model.quantization.layers)
    graph = onnx.load(file).graph
    stored = [np.prod(item.dims, dtype=int) for item in graph.initializer if item.data_type == onnx.TensorProto.INT8]
    assert weights <= sum(stored) < 1.05 * weights


def test_only_activations_of_few_bits_are_clipped(exported: Any) -> None:
    model, file = exported(SIMCC)
    graph = onnx.load(file).graph
    stored = {item.name for item in graph.initializer}
    clips = [node for node in graph.node if node.op_type == 'Clip']
    assert not [node.name for node in clips if node.input[0] in stored]
    few = [layer for layer in model.quantization.quantized if layer.policy.act_bit_width < 8]
    assert len(clips) == len(few) > 0


@pytest.mark.parametrize('case', ARCHITECTURES, ids=lambda case: case.name)
def test_nothing_but_the_network_is_in_the_graph(case: Case, exported: Any) -> None:
    _, file = exported(case)
    graph = onnx.load(file).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {'Identity', 'Shape', 'Gather', 'Constant'}
    used = {name for node in graph.node for name in node.input}
    assert {item.name for item in graph.initializer} <= used
    assert [value.name for value in graph.input] == ['input']


def test_the_constants_are_in_the_file_and_beside_it(exported: Any) -> None:
    model, file = exported(SIMCC)
    beside = json.loads(file.with_suffix('.json').read_text())
    inside = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(inside[METADATA_KEY]) == beside
    assert beside['input'] == {
        'name': 'input', 'width': 64, 'height': 64, 'channels': 'rgb', 'mean': [123.675, 116.28, 103.53],
        'std': [58.395, 57.12, 57.375],
    }  # fmt: skip
    assert beside['crop'] == {'padding': 1.5, 'udp': False}
    assert beside['outputs'] == ['simcc_x', 'simcc_y']
    assert beside['codec']['type'] == 'SimCCLabel'
    assert beside['codec']['simcc_split_ratio'] == model.head.decoder.simcc_split_ratio
    assert beside['keypoints']['names'] == ['head', 'foot']
    assert beside['keypoints']['skeleton'] == [[0, 1]]
    assert beside['format'] == 'qcdq'
    assert beside['flip_test'] is True
    assert beside['quantization']['default']['weight_bit_width'] == 4
    assert torch.__version__.startswith(beside['versions']['torch'].split('+')[0])


@pytest.mark.slow
def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = calibrated(SIMCC).train()
    before, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    parameters = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    outputs = outputs_of(model.eval(), images())
    model.train()
    file = tmp_path / 'model.onnx'
    file.write_text('replaced')
    export_onnx(model, file, 'qcdq', {})
    onnx.checker.check_model(onnx.load(file))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert parameters == {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    for one, other in zip(outputs, outputs_of(model.eval(), images()), strict=True):
        assert np.array_equal(one, other)


def test_an_existing_file_stays_if_the_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: nn.Module, file: Path, file_format: str) -> None:
        file.write_text('half a')
        raise KeyboardInterrupt

    file = tmp_path / 'model.onnx'
    file.write_text('something of the user')
    model = calibrated(SIMCC)
    monkeypatch.setattr(export, '_write', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, file, 'qcdq', {})
    assert file.read_text() == 'something of the user'
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


def test_other_weights_than_the_files_are_noticed(exported: Any) -> None:
    _, file = exported(SIMCC)
    with pytest.raises(RuntimeError, match="none of the model's: the file was exported from another model"):
        integers(calibrated(SIMCC, seed=1).eval(), file, 'qcdq')


# -------------------------------------------------------------------- errors
def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='onnx' is not allowed: one of qcdq, qonnx"):
        export_onnx(calibrated(SIMCC), tmp_path / 'x.onnx', 'onnx', {})


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'is a float model: quantize it by a fragment, as _base_ = \[RECIPE'):
        export_onnx(float_model(SIMCC), tmp_path / 'x.onnx', 'qcdq', {})


def test_an_uncalibrated_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match='has not been calibrated'):
        export_onnx(quantized(SIMCC), tmp_path / 'x.onnx', 'qcdq', {})
    assert not list(tmp_path.iterdir())


def test_a_head_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"the head's outputs, \[\[2, 3\]\], are not known"):
        output_names([torch.zeros(2, 3)])
    with pytest.raises(UserError, match='InstanceData'):
        output_names([InstanceData()])


def test_a_model_without_a_codec_is_refused() -> None:
    with pytest.raises(UserError, match=r'model=Linear \(head: none\) cannot be exported'):
        codec_constants(nn.Linear(2, 2))


def test_a_pipeline_that_crops_otherwise_is_refused() -> None:
    with pytest.raises(UserError, match='has no GetBBoxCenterScale and no TopdownAffine'):
        deployment_constants(float_model(SIMCC), PIPELINE[:1], META)
