"""Small quantized models that the tests train, calibrated, and their batches."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest.mock import patch

import torch
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mm_sharp.quantization import QuantizationPolicy, calibrate, quantize
from tests import mmpose_cases, toys
from tests.conftest import ROOT
from tests.toys import Batch, Notes, ToyNet, make, same_bits

SIZE = (6, 6)
# Bits of weights and inputs, and what scales start from, as in configs/_base_/quantization.
BITS: dict[str, tuple[int, int, str]] = {'W8A8': (8, 8, 'max'), 'W4A4': (4, 4, 'mse'), 'W2A4': (2, 4, 'mse')}
# Policies by name.
POLICIES: dict[str, dict[str, Any]] = {
    f'{bits}{" folded" * folded}': dict(
        weight_bit_width=weight, act_bit_width=act, scale_init=init, fold_batchnorm=folded
    )
    for bits, (weight, act, init) in BITS.items()
    for folded in (False, True)
}
LEARNED = tuple(POLICIES)
POLICIES['zero points'] = {**POLICIES['W4A4'], 'weight_symmetric': False, 'act_symmetric': False}
POLICIES['statistics'] = {
    **POLICIES['W4A4'],
    **dict(weight_scales='statistics', scale_init='max', act_scales='fixed', weight_granularity='tensor'),
}
Parameters = dict[str, Tensor]
SIMCC = ROOT / 'configs' / 'demo' / 'simcc_res18-half_demo-128x96.py'


@MODELS.register_module()
class ResidualToy(ToyNet):
    """A ``ToyNet`` with a residual branch: BatchNorms behind convolutions and one behind the sum, which is not folded.

    Args:
        kwargs: Those of ``ToyNet``; ``with_cp`` recomputes all convolutions in the backward pass.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = nn.Conv2d(3, 6, 3)
        self.branch = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.branch_norm, self.sum_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def features(self, inputs: Tensor) -> Tensor:
        first = super().features(inputs)
        return torch.relu(self.sum_norm(first + self.branch_norm(self.branch(first))))


@DATASETS.register_module()
class ResidualSamples(toys.ToySamples):
    """``count`` random samples for :class:`ResidualToy`."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__(count)
        (batch,) = batches(1, count, seed)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(count)]


def batches(count: int, size: int = 8, seed: int = 0) -> list[Batch]:
    """As :func:`tests.toys.batches`, of three channels, which quantization takes a picture to have."""
    generator = torch.Generator().manual_seed(seed)
    plain = toys.batches(count, size, seed)
    return [{**batch, 'inputs': torch.randn(size, 3, *SIZE, generator=generator)} for batch in plain]


def pool_batches(count: int, size: int = 8, pool: int = 24) -> list[Batch]:
    """``count`` batches of ``size`` distinct samples out of ``pool``, so that samples come again."""
    (samples,) = batches(1, pool)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randperm(pool, generator=generator)[:size] for _ in range(count)]
    return [{name: value[chosen] for name, value in samples.items()} for chosen in rows]


def policy(name: str = 'W4A4') -> dict[str, Any]:
    """A toy's policy as a config has it; its ends have as few bits as the rest, so that enough layers have them."""
    return {**POLICIES[name], 'first_layers': 'same', 'last_layers': 'same', 'input_size': SIZE}


def uncalibrated(name: str = 'W4A4', seed: int = 0, **kwargs: Any) -> ResidualToy:
    """A quantized toy whose quantizers have no scales yet; ``kwargs`` go to :class:`ResidualToy`."""
    model = make(ResidualToy, seed=seed, **kwargs)
    # Statistics and weights that are not a new BatchNorm's, so that folding it changes weights.
    generator = torch.Generator().manual_seed(seed)
    for norm in (model.norm, model.branch_norm, model.sum_norm):
        norm.running_mean.copy_(0.2 * torch.randn(6, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(6, generator=generator))
        norm.weight.data.copy_(0.5 + torch.rand(6, generator=generator))
    quantized = quantize(model, QuantizationPolicy.from_config(policy(name)))
    assert isinstance(quantized, ResidualToy)
    return quantized


def quantized(name: str = 'W4A4', **kwargs: Any) -> ResidualToy:
    """A calibrated toy, in training mode; the same weights and scales every time."""
    return copy.deepcopy(_calibrated(name, tuple(kwargs.items())))


@functools.cache
def _calibrated(name: str, options: tuple[tuple[str, Any], ...]) -> ResidualToy:
    model = uncalibrated(name, **dict(options))
    calibrate(model, batches(2, seed=5))
    return model


@functools.cache
def simcc() -> tuple[nn.Module, dict[str, Any]]:
    """The demo's SimCC ResNet-18 with an eighth of its width, W4A4, BatchNorm not folded; and a batch of 4 people."""
    case = mmpose_cases.Case('SimCC', str(SIMCC), (96, 128), stride=None)
    cfg = case.config()
    cfg.model.backbone.update(stem_channels=8, base_channels=8)
    cfg.model.head.in_channels = 64
    with (
        patch.object(mmpose_cases, 'BATCH', 4),
        DefaultScope.overwrite_default_scope('mmpose'),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        batch, model = case.batch(cfg), mmpose_cases.build(cfg)
    for number, sample in enumerate(batch['data_samples']):
        sample.set_metainfo({'id': number, 'dataset_name': 'drawn'})
    quantize(model, QuantizationPolicy.from_config(POLICIES['W4A4']))
    calibrate(model, [batch])
    return model, batch


def slow_sgd(model: nn.Module) -> Optimizer:
    """Slow enough for scales of 2 bits, and without weight decay, which would move what gets no gradient."""
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


def parameters_of(model: nn.Module) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_spared(name: str) -> bool:
    """Scales, zero points and biases: trained, and not perturbed."""
    return 'tensor_quant' in name or name.endswith('bias')


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the weights of ``source``; buffers stay."""
    with torch.no_grad():
        for left, right in zip(target.parameters(), source.parameters(), strict=True):
            left.copy_(right)


def unequal(left: Parameters, right: Parameters) -> set[str]:
    """Names of the parameters that are not the same bit for bit."""
    assert left.keys() == right.keys()
    return {name for name in left if not same_bits(left[name], right[name])}


class Watch:
    """The parameters as each forward pass with gradients saw them."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Parameters] = Notes()
        model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.seen.append(parameters_of(module))


def plain_state(model: nn.Module) -> dict[str, object]:
    """All that a forward pass could change besides parameters: buffers, numbers, flags and tensors of every submodule.

    Returns:
        By dotted name; tensors as their dtype, shape and bytes.
    """
    found: dict[str, object] = {}
    for prefix, member in model.named_modules():
        for name, value in {**vars(member), **member._buffers}.items():
            if isinstance(value, Tensor):
                found[f'{prefix}.{name}'] = (value.dtype, value.shape, value.detach().numpy().tobytes())
            elif value is None or isinstance(value, (bool, int, float, str)):
                found[f'{prefix}.{name}'] = (type(value), repr(value))
    return found
