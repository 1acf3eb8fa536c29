"""tools/draw_keypoints.py: MMPose's arithmetic without MMPose, and a picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import KEYPOINT_CODECS
from onnx import TensorProto, helper

from mm_sharp.quantization.deployment import deployment_constants, plain
from mm_sharp.quantization.export import Network, export_onnx
from tests.conftest import ROOT
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import DECONV, RLE, SIMCC, SIZE, calibrated
from tests.tiny_data import draw_coco
from tests.tool_runs import tool

pytestmark = QUIET
SCRIPT = ROOT / 'tools' / 'draw_keypoints.py'
HEATMAPS = (16, 24)
CODECS: dict[str, dict[str, Any]] = {
    'simcc': {'type': 'SimCCLabel', 'input_size': (64, 96), 'simcc_split_ratio': 2.0},
    'msra': {'type': 'MSRAHeatmap', 'input_size': (64, 96), 'heatmap_size': HEATMAPS, 'sigma': 2},
    'dark': {'type': 'MSRAHeatmap', 'input_size': (64, 96), 'heatmap_size': HEATMAPS, 'sigma': 2, 'unbiased': True},
    'udp': {'type': 'UDPHeatmap', 'input_size': (64, 96), 'heatmap_size': HEATMAPS, 'sigma': 2},
    'udp combined': {
        'type': 'UDPHeatmap', 'input_size': (64, 96), 'heatmap_size': HEATMAPS, 'heatmap_type': 'combined',
    },
    'megvii': {'type': 'MegviiHeatmap', 'input_size': (64, 96), 'heatmap_size': HEATMAPS, 'kernel_size': 5},
    'regression': {'type': 'RegressionLabel', 'input_size': (64, 96)},
    'regression with deviations': {'type': 'RegressionLabel', 'input_size': (64, 96)},
}  # fmt: skip
SHAPES = {
    'simcc': [(5, 128), (5, 192)],
    'msra': [(5, 24, 16)],
    'dark': [(5, 24, 16)],
    'udp': [(5, 24, 16)],
    'udp combined': [(15, 24, 16)],
    'megvii': [(5, 24, 16)],
    'regression': [(5, 2)],
    'regression with deviations': [(5, 4)],
}
BOXES = [[10, 20, 50, 70], [0, 0, 96, 128], [30, -10, 90, 30]]


@pytest.fixture(scope='module')
def script() -> ModuleType:
    return tool('draw_keypoints')


@pytest.fixture(scope='module')
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn person, 96 x 128 pixels."""
    return draw_coco(tmp_path_factory.mktemp('people') / 'coco', train=0, val=1) / 'val' / '000001.png'


def pipeline(udp: bool) -> list[dict[str, Any]]:
    return [
        {'type': 'LoadImage'},
        {'type': 'GetBBoxCenterScale'},
        {'type': 'TopdownAffine', 'input_size': SIZE, 'use_udp': udp},
        {'type': 'PackPoseInputs'},
    ]


def prepared(case: Case, udp: bool = False) -> tuple[Any, dict[str, Any]]:
    """A quantized model as MMPose's inference takes it, and its constants."""
    model: Any = calibrated(case, weight=8, act=8).eval()
    meta = parse_pose_metainfo({'from_file': 'configs/_base_/datasets/coco.py'})
    model.dataset_meta = meta
    model.cfg = Config({'test_dataloader': {'dataset': {'pipeline': pipeline(udp)}}, 'default_scope': 'mmpose'})
    model.test_cfg = {**model.test_cfg, 'flip_test': False}
    constants = deployment_constants(model, pipeline(udp), meta)
    return model, constants


def expected(model: Any, picture: Path, boxes: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What MMPose finds."""
    from mmpose.apis import inference_topdown  # after mm_sharp, which mends what it imports

    found = inference_topdown(model, str(picture), np.array(boxes, np.float32), bbox_format='xywh')
    instances = [sample.pred_instances for sample in found]
    return np.concatenate([i.keypoints for i in instances]), np.concatenate([i.keypoint_scores for i in instances])


class PyTorchSession:
    """Runs the PyTorch model where ONNX Runtime would run the exported one."""

    def __init__(self, model: Any) -> None:
        self.network = Network(model)

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in self.network(torch.from_numpy(inputs['input']))]


@pytest.mark.parametrize('name', CODECS)
def test_decoding_is_that_of_mmposes_codec(script: ModuleType, name: str) -> None:
    codec = KEYPOINT_CODECS.build(CODECS[name])
    arguments = {key: plain(value) for key, value in vars(codec).items()}
    rng = np.random.default_rng(0)
    outputs = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES[name]]
    if outputs[0].ndim == 3:  # hills, as a network makes them, and one map with nothing in it
        outputs = [np.stack([cv2.GaussianBlur(m, (9, 9), 2) for m in outputs[0]])]
        outputs[0][0] = -1
    given = outputs if name == 'simcc' else [outputs[0][None] if name.startswith('regression') else outputs[0]]
    points, scores = codec.decode(*(array.copy() for array in given))
    constants = {'codec': {**arguments, 'type': CODECS[name]['type']}, 'head': 'RegressionHead'}
    ours, our_scores = script.decode([array[None].copy() for array in outputs], constants)
    assert np.allclose(our_scores, scores, atol=1e-6)
    # Of a map with nothing in it, MMPose's UDP decodes what lies beside it in memory.
    seen = scores[0] > 0 if name.startswith('udp') else np.ones(5, bool)
    assert seen.sum() >= 4
    assert np.allclose(ours[:, seen], points[:, seen], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'udp'),
    [(SIMCC, False), *(pytest.param(DECONV, udp, marks=pytest.mark.slow) for udp in (False, True)), (RLE, False)],
    ids=['simcc', 'heatmap', 'udp crop', 'regression'],
)  # fmt: skip
def test_keypoints_are_those_of_mmposes_inference(script: ModuleType, picture: Path, case: Case, udp: bool) -> None:
    model, constants = prepared(case, udp)
    runnable = script.Model.__new__(script.Model)
    runnable.constants = {**constants, 'outputs': []}
    runnable._session = PyTorchSession(model)
    points, scores = runnable.predict(cv2.imread(str(picture)), np.array(BOXES, float))
    their_points, their_scores = expected(model, picture, BOXES)
    assert np.allclose(points, their_points, atol=0.01)
    assert np.allclose(scores, their_scores, atol=1e-4)


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, constants = prepared(SIMCC)
    return model, export_onnx(model, tmp_path_factory.mktemp('onnx') / 'model.onnx', 'qcdq', constants)


@pytest.mark.slow
def test_the_exported_model_finds_what_the_model_finds(
    script: ModuleType, exported: tuple[Any, Path], picture: Path
) -> None:
    model, file = exported
    points, _ = script.Model(file).predict(cv2.imread(str(picture)), np.array(BOXES, float))
    distances = np.linalg.norm(points - expected(model, picture, BOXES)[0], axis=-1)
    # Weights are random, so some keypoints have two places that are as likely: a rounding flip chooses another.
    assert np.median(distances) < 0.01
    assert (distances < 1).mean() > 0.8


@pytest.mark.slow
def test_it_runs_without_torch_and_mmpose(exported: tuple[Any, Path], picture: Path, tmp_path: Path) -> None:
    _, file = exported
    blocked = ('torch', 'mmengine', 'mmcv', 'mmpose', 'mm_sharp', 'onnx', 'brevitas')
    copied = tmp_path / 'draw.py'
    copied.write_bytes(SCRIPT.read_bytes())
    code = (
        f'import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); runpy.run_path("draw.py", None, "__main__")'
    )
    arguments = [
        file,
        picture,
        '--bbox',
        10,
        20,
        50,
        70,
        '--bbox',
        0,
        0,
        90,
        90,
        '--out',
        'a/b.png',
        '--json',
        'new/k.json',
    ]
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '2 people, 17 keypoints each' in done.stdout
    drawn, original = cv2.imread(str(tmp_path / 'a' / 'b.png')), cv2.imread(str(picture))
    assert drawn.shape == original.shape
    assert (drawn != original).any(-1).sum() > 50
    people = json.loads((tmp_path / 'new' / 'k.json').read_text())
    assert people['names'][0] == 'nose'
    assert np.shape(people['people'][1]['keypoints']) == (17, 2)


@pytest.mark.slow
def test_the_example_in_the_documentation_finds_the_same(
    script: ModuleType, exported: tuple[Any, Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'export.md').read_text(), flags=re.DOTALL)
    (tmp_path / 'model.onnx').write_bytes(exported[1].read_bytes())
    (tmp_path / 'image.png').write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    points, _ = script.Model('model.onnx').predict(cv2.imread('image.png'), np.array([[10, 20, 50, 70]], float))
    distances = np.linalg.norm(names['keypoints'] - points[0], axis=-1)
    assert np.median(distances) < 0.01
    assert (distances < 1).mean() > 0.8  # -1 where no bin is above 0 is the script's alone


def test_only_keypoints_above_the_threshold_are_drawn(script: ModuleType) -> None:
    image = np.zeros((60, 60, 3), np.uint8)
    points = np.array([[[10, 10], [40, 40], [10, 50]]], float)
    keypoints = {
        'colors': [[255, 0, 0], [0, 255, 0], [0, 0, 255]], 'skeleton': [[0, 1], [0, 2]],
        'skeleton_colors': [[9, 9, 9], [7, 7, 7]],
    }  # fmt: skip
    drawn = script.draw(image, points, np.array([[0.9, 0.8, 0.1]]), keypoints, 0.5)
    assert not image.any()
    assert drawn[10, 10].tolist() == [0, 0, 255]  # red, in OpenCV's order
    assert drawn[40, 40].tolist() == [0, 255, 0]
    assert drawn[25, 25].tolist() == [9, 9, 9]
    assert not drawn[50, 10].any()
    assert not drawn[30, 10].any()


# -------------------------------------------------------------------- errors
def quant_graph(domain: str) -> onnx.ModelProto:
    """A graph with one node, of ONNX's own domain or QONNX's."""
    kind, inputs = ('Identity', ['input']) if not domain else ('Quant', ['input', 's', 'z', 'b'])
    node = helper.make_node(kind, inputs, ['out'], domain=domain)
    scalars = [helper.make_tensor(name, TensorProto.FLOAT, [], [1.0]) for name in inputs[1:]]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ('input', 'out')]
    graph = helper.make_graph([node], 'g', value[:1], value[1:], scalars)
    opsets = [helper.make_opsetid('', 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(
    ('model', 'arguments', 'message'),
    [
        ('missing.onnx', [], "no model 'missing.onnx'"),
        ('text.onnx', [], "ONNX Runtime cannot read 'text.onnx'"),
        ('foreign.onnx', [], "'foreign.onnx' has no metadata of mm_sharp: write it with tools/export.py"),
        ('quant.onnx', [], 'is a QONNX file: export with --format qcdq'),
        ('later.onnx', [], 'was written by a later version of mm_sharp'),
        ('gray.onnx', [], "'gray.onnx' takes pictures of 1 channel(s), and only 3 are written here"),
        ('text.onnx', ['--bbox', '1', '2', '0', '4'], 'width and height must be above 0'),
        ('text.onnx', ['--bbox', '1', '2', '3'], '--bbox'),
        ('text.onnx', ['--bbox', 'nan', '1', '2', '3'], '--bbox: all four must be numbers below 10 million'),
        ('text.onnx', ['--bbox', '1e30', '0', 'inf', '3'], '--bbox: all four must be numbers below 10 million'),
        ('bare.onnx', [], "'bare.onnx' has no constants of cropping and decoding: write it with tools/export.py"),
        ('model.onnx', ['--out', 'text.onnx/x.jpg'], "--out 'text.onnx/x.jpg': its folder cannot be made"),
        ('model.onnx', ['--out', 'folder.png'], "--out 'folder.png' is a folder"),
        ('model.onnx', ['--out', 'x.none'], "--out 'x.none': OpenCV writes .jpg and .png"),
        ('model.onnx', ['--out', 'x.exr'], "--out 'x.exr': OpenCV writes .jpg and .png"),
        ('model.onnx', ['--out', '/proc/x.png'], "--out '/proc/x.png' cannot be written"),
        ('model.onnx', ['--json', 'text.onnx/x.json'], "--json 'text.onnx/x.json': its folder cannot be made"),
        ('model.onnx', ['--json', 'folder.png'], "--json 'folder.png' is a folder"),
        ('model.onnx', ['--json', '/proc/x.json'], "--json '/proc/x.json' cannot be written"),
    ],
)
def test_mistakes_are_explained(
    script: ModuleType,
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('text.onnx').write_text('no model')
    onnx.save(quant_graph(''), 'foreign.onnx')
    onnx.save(quant_graph('qonnx.custom_op.general'), 'quant.onnx')
    later = quant_graph('')
    helper.set_model_props(later, {'mm_sharp': json.dumps({'version': 99})})
    onnx.save(later, 'later.onnx')
    helper.set_model_props(later, {'mm_sharp': json.dumps({'format': 'float', 'outputs': ['out']})})
    onnx.save(later, 'bare.onnx')
    helper.set_model_props(later, {'mm_sharp': json.dumps({'version': 1, 'input': {'mean': [116.0]}})})
    onnx.save(later, 'gray.onnx')
    constants = {'version': 1, 'input': {'mean': [0.0, 0.0, 0.0]}, 'keypoints': {'names': ['nose']}}
    helper.set_model_props(later, {'mm_sharp': json.dumps(constants)})
    onnx.save(later, 'model.onnx')
    Path('folder.png').mkdir()
    found = np.zeros((1, 1, 2)), np.ones((1, 1))
    monkeypatch.setattr(script.Model, 'predict', lambda *args: found)
    monkeypatch.setattr(script, 'draw', lambda image, *args: image)
    with pytest.raises(script.UsageError) as caught:
        script.main([model, str(picture), '--out', 'x.png', *arguments])
    assert message in str(caught.value)


@pytest.mark.parametrize('name', ['none.jpg', 'text.jpg', 'switched_off.exr'])
def test_a_file_that_is_no_picture_is_refused(script: ModuleType, name: str, tmp_path: Path) -> None:
    (tmp_path / 'text.jpg').write_text('no picture')
    # OpenCV knows the format by its first bytes, and raises an error of its own: it is switched off.
    (tmp_path / 'switched_off.exr').write_bytes(bytes.fromhex('762f3101') + bytes(60))
    with pytest.raises(script.UsageError, match='is not there, or no picture'):
        script.main(['x.onnx', str(tmp_path / name), '--out', 'x.png'])


def test_an_unknown_codec_is_refused(script: ModuleType) -> None:
    with pytest.raises(script.UsageError, match='the codec SPR'):
        script.decode([np.zeros((1, 2, 4, 4))], {'codec': {'type': 'SPR'}, 'head': 'HeatmapHead'})


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, 'x.onnx', 'y.jpg', '--out', 'z.jpg'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "draw_keypoints.py: error: 'y.jpg' is not there, or no picture that OpenCV reads\n"
