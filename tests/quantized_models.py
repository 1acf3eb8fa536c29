"""MMPose's recipes of the architectures that are quantized, made narrow and shallow, and what tests compare them with.

Their structure is the recipe's: blocks, activations, necks and heads are all there, in small numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpose.structures import PoseDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.quantization import QuantizationPolicy, calibrate, quantize
from tests.mmpose_cases import Case, build

SIZE = (64, 64)
_BODY = 'body_2d_keypoint'


def sized(cfg: Config, channels: int) -> None:
    """Tell a head how many channels it gets, and that pictures are of :data:`SIZE`."""
    head = cfg.model.head
    head.in_channels = channels
    for part in (head, head.decoder):
        if 'input_size' in part:
            part.input_size = SIZE
    if 'heatmap_size' in head.decoder:
        head.decoder.heatmap_size = (SIZE[0] // 4, SIZE[1] // 4)
    if 'in_featuremap_size' in head:
        head.in_featuremap_size = (SIZE[0] // 32, SIZE[1] // 32)


def _resnet(cfg: Config) -> None:
    cfg.model.backbone.update(depth=18, stem_channels=4, base_channels=4)
    cfg.model.head.deconv_out_channels = (8, 8, 8)
    sized(cfg, 32)


def _hrnet(cfg: Config) -> None:
    extra = cfg.model.backbone.extra
    for number, stage in enumerate(extra.values()):
        stage.update(num_modules=1, num_blocks=(1,) * stage.num_branches)
        stage.num_channels = tuple(4 * 2**i for i in range(stage.num_branches)) if number else (4,)
    sized(cfg, 4)


def _mobilenet(cfg: Config) -> None:
    cfg.model.backbone.widen_factor = 0.25
    sized(cfg, 1280)


def _rtmpose(cfg: Config) -> None:
    cfg.model.backbone.widen_factor = 0.125
    cfg.model.head.gau_cfg.update(hidden_dims=16, s=8)
    sized(cfg, 128)


SIMCC = Case('ResNet-SimCC', f'{_BODY}/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py', SIZE, edit=_resnet)
DECONV = Case(
    'ResNet-heatmap', f'{_BODY}/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py', SIZE, edit=_resnet
)
HRNET = Case(
    'HRNet-heatmap', f'{_BODY}/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py', SIZE, edit=_hrnet
)
RLE = Case(
    'MobileNetV2-RLE',
    f'{_BODY}/topdown_regression/coco/td-reg_mobilenetv2_rle-pretrained-8xb64-210e_coco-256x192.py',
    SIZE,
    edit=_mobilenet,
)
RTMPOSE = Case('CSPNeXt-RTMCC', f'{_BODY}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py', SIZE, edit=_rtmpose)
# The smallest; the others with what is slow.
MODELS_OF_MMPOSE = (SIMCC, *(pytest.param(case, marks=pytest.mark.slow) for case in (DECONV, HRNET, RLE, RTMPOSE)))
EVERY = pytest.mark.parametrize('case', MODELS_OF_MMPOSE, ids=lambda case: case.name)


def float_model(case: Case, seed: int = 0, **backbone: Any) -> nn.Module:
    """A float model in training mode, whose weights and BatchNorms are those of ``seed``.

    Args:
        case: One of :data:`MODELS_OF_MMPOSE`.
        seed: Of the weights.
        backbone: Changes to the backbone's config.
    """
    return deepcopy(_float_model(case, seed, tuple(backbone.items())))


@cache
def _float_model(case: Case, seed: int, backbone: tuple[tuple[str, Any], ...]) -> nn.Module:
    init_default_scope('mmpose')
    cfg = case.config()
    cfg.model.backbone.update(dict(backbone))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return draw_batchnorms(build(cfg), seed)


def draw_batchnorms(model: nn.Module, seed: int) -> nn.Module:
    """Give every BatchNorm statistics, weights and biases at random, as training does: all signs, all sizes."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.3, 2, generator=generator)
            if norm.affine:
                norm.weight.data.uniform_(-0.5, 1.5, generator=generator)
                norm.bias.data.normal_(0, 0.3, generator=generator)
    return model


def images(count: int = 2, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """(count, 3, H, W) as they leave the data preprocessor: noise from -2 to 2."""
    return 4 * torch.rand(count, 3, size[1], size[0], generator=torch.Generator().manual_seed(seed)) - 2


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    """All that a model puts out in evaluation mode, as one vector; its mode stays as it is."""
    training = model.training
    with torch.no_grad():
        result = model.eval()(inputs, None, mode='tensor')
    model.train(training)
    return torch.cat([tensor.flatten() for tensor in (result if isinstance(result, (tuple, list)) else [result])])


def distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max() / right.abs().max())


def policy(weight: int = 4, act: int = 4, **changes: Any) -> dict[str, Any]:
    """As a config has it; scales from maxima, which take no search."""
    return dict(weight_bit_width=weight, act_bit_width=act, scale_init='max', **changes)


def quantized(case: Case, seed: int = 0, **changes: Any) -> nn.Module:
    """A quantized model that has not been calibrated; ``changes`` are those of :func:`policy`."""
    return deepcopy(_quantized(case, seed, tuple(sorted(changes.items()))))


@cache
def _quantized(case: Case, seed: int, changes: tuple[tuple[str, Any], ...]) -> nn.Module:
    return quantize(float_model(case, seed), QuantizationPolicy.from_config(policy(**dict(changes))))


def calibrated(case: Case, seed: int = 0, **changes: Any) -> nn.Module:
    """The same after calibration on noise."""
    return deepcopy(to_read(case, seed, **changes))


def to_read(case: Case, seed: int = 0, **changes: Any) -> nn.Module:
    """The same as :func:`calibrated`, but not a model of the caller's own: nothing in it may be changed."""
    return _calibrated(case, seed, tuple(sorted(changes.items())))


@cache
def _calibrated(case: Case, seed: int, changes: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = quantized(case, seed, **dict(changes))
    calibrate(model, samples(2))
    return model


def samples(batches: int, size: int = 2) -> list[dict[str, Any]]:
    """Batches as a data loader delivers them, of pictures of noise without labels."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, SIZE[1], SIZE[0])
    return [
        {
            'inputs': [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(size)],
            'data_samples': [PoseDataSample() for _ in range(size)],
        }
        for _ in range(batches)
    ]


class Toy(nn.Module):
    """A forward given as a function of the model and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        return self.run(self, inputs)


def conv(inputs: int, outputs: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)
