"""Any backbone is quantized, trained and exported, or refused in one line; all of them: `make sweep-qat`."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpose.registry import MODELS

from mm_sharp.quantization import QuantizationPolicy, calibrate, quantize
from mm_sharp.quantization.export import Network, export_onnx
from mm_sharp.quantization.export_check import keypoint_distances, predict
from tests.mmpose_cases import QUIET, Case

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ('mmpretrain', 'timm')),
        reason='MMPretrain or timm is not installed: pip install "mm_sharp[classification,timm]"',
    ),
    *QUIET,
]


def test_every_backbone_that_mmpose_ships_is_tried() -> None:
    import mmpose.models  # noqa: F401

    from tests.sweep.quantized_backbones import BACKBONES

    kinds = {
        name for name, kind in MODELS.module_dict.items() if kind.__module__.startswith('mmpose.models.backbones.')
    }
    assert len(kinds) > 30
    assert kinds <= BACKBONES.keys()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 bits alone, and less deep than the table's."""
    from mmpose.models.backbones import MobileNetV2

    from tests.sweep import quantized_trial
    from tests.sweep.quantized_backbones import BACKBONES

    monkeypatch.setattr(quantized_trial, 'POLICIES', {'W8A8': quantized_trial.POLICIES['W8A8']})
    blocks = [[expand, width, min(count, 2), stride] for expand, width, count, stride in MobileNetV2.arch_settings[:2]]
    blocks += [[expand, width, 1, stride] for expand, width, _, stride in MobileNetV2.arch_settings[2:]]
    monkeypatch.setattr(MobileNetV2, 'arch_settings', blocks)
    timm = dict(type='mmpretrain.TIMMBackbone', model_name='regnetx_002', features_only=True, out_indices=(2,))
    monkeypatch.setitem(BACKBONES, 'timm: regnetx_002', (timm, 56))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'layers', 'batchnorms'),
    [('MobileNetV2', 29, 28), ('VGG, without BatchNorm', 12, 3), ('timm: regnetx_002', 13, 12)],
)
@pytest.mark.usefixtures('_small')
def test_all_layers_are_quantized_and_the_file_agrees(name: str, layers: int, batchnorms: int) -> None:
    from tests.sweep.quantized_trial import trial

    found: dict[str, Any] = trial(name)['W8A8']
    assert found['layers'] == [layers, layers]
    assert found['batchnorms'] == [batchnorms, batchnorms]
    assert found['trained']
    assert found['agrees']


@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
def test_a_backbone_of_volumes_is_refused_in_one_line() -> None:
    from tests.sweep.quantized_trial import trial

    refused = trial('V2VNet')['refused']
    assert '\n' not in refused
    assert 'does not run on a picture (1, 3, 64, 64): backbone.front_layers.0.block.conv: RuntimeError' in refused
    assert 'sharp_quantization = None' in refused


def test_the_page_has_every_kind_of_row() -> None:
    from tests.sweep.quantized import page

    good = {'layers': [3, 4], 'batchnorms': [2, 2], 'reasons': ['not called in inference'], 'trained': True}
    good |= {'agrees': True, 'convolutions': [2, 3]}
    refused = {**good, 'not_exported': 'torch cannot write it'}
    text = page({
        'VGG': {'name': 'VGG', 'W8A8': good, 'W4A4': {**good, 'agrees': False}},
        'CPM': {'name': 'CPM', 'W8A8': refused, 'W4A4': refused},
        'TCN': {'name': 'TCN', 'refused': 'no pictures'},
        'RSN': {'name': 'RSN', 'fault': 'KeyError: 1'},
    })  # fmt: skip
    assert '| VGG | 3 of 4 | 2 of 2 | yes | yes | yes | differs | 2 of 3 |' in text
    assert '## Trained, but not exported' in text
    assert '\n- CPM: torch cannot write it\n' in text
    assert '## Refused before training\n\n- TCN: no pictures\n' in text
    assert 'Not tried yet: AlexNet, ' in text
    assert '## Faults\n\n- RSN: KeyError: 1\n' in text
    assert '- VGG: not called in inference\n' in text


@pytest.mark.slow
@pytest.mark.parametrize('name', ['CPM', 'MSPN'])
def test_of_several_stages_the_last_is_exported_as_mmpose_predicts_by_it(name: str, tmp_path: Path) -> None:
    from tests.sweep.quantized_backbones import SIZE, config
    from tests.sweep.quantized_trial import POLICIES
    from tests.sweep.recipes import made_shallow

    cfg = config(name)
    init_default_scope('mmpose')
    with made_shallow(cfg.model), torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = quantize(MODELS.build(cfg.model), QuantizationPolicy.from_config(POLICIES['W8A8'])).eval()
    with torch.no_grad():
        stages = model.head.forward(model.extract_feat(torch.zeros(1, 3, *SIZE)))
    data = Case('', '', SIZE, SIZE[0] // stages[-1].shape[-1], 17).batch(cfg)
    calibrate(model, [data])
    file = export_onnx(model, tmp_path / 'model.onnx', 'qcdq', {})
    # The graph as it is: in integers, on a processor without VNNI, 13 of 17 keypoints of untrained heatmaps agree.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options)
    assert [output.name for output in session.get_outputs()] == ['heatmaps']
    data = model.data_preprocessor(data, False)
    inputs, samples = data['inputs'], data['data_samples']
    for sample in samples:
        sample.set_metainfo(dict(flip_indices=list(range(17))))
    both = (inputs, inputs.flip(-1)) if model.test_cfg.flip_test else (inputs,)
    outputs = [session.run(None, {'input': pictures.numpy()}) for pictures in both]
    with torch.no_grad():
        own = model.predict(inputs, deepcopy(samples))
        expected = model.head.forward(model.extract_feat(inputs))[-1].numpy()
    theirs = predict(model, outputs, inputs, samples)
    assert np.abs(outputs[0][0] - expected).max() < 0.1 * np.ptp(expected)
    assert np.mean(keypoint_distances(own, theirs) <= 1) > 0.9
    exact = [[heatmaps.numpy()] for heatmaps in (Network(model)(pictures)[0].detach() for pictures in both)]
    assert keypoint_distances(own, predict(model, exact, inputs, samples)).max() == 0
