"""BatchNorm folded, in models and checkpoints, and classes that are not what they derive from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d
from mmengine.model import initialize
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.runner.checkpoint import load_checkpoint
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.quantization import QuantizationPolicy, build, calibrate, folding, quantize
from mm_sharp.quantization.flow import float_output as run_in_float
from mm_sharp.quantization.flow import trace_flow, without_quantizers
from mm_sharp.quantization.folding import fold_batchnorms
from mm_sharp.quantization.quantizers import uninitialised
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import (
    EVERY,
    HRNET,
    Toy,
    conv,
    distance,
    draw_batchnorms,
    float_model,
    images,
    output,
    policy,
)
from tests.toys import same_state

pytestmark = QUIET
SIZE = (8, 8)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: it drops blocks and activates, too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, inputs: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(inputs)))
        return activated


class Halved(nn.Conv2d):
    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * super().forward(inputs)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def forward_replaced(module: nn.Module) -> nn.Module:
    inner = module.forward
    module.forward = lambda inputs: 3 * inner(inputs)
    return module


def weight_normed(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='`torch.nn.utils.weight_norm` is deprecated')
        return nn.utils.weight_norm(module)


def norm(channels: int = 4, **kwargs: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **kwargs)


def pairs_of(model: nn.Module, inputs: Tensor | None = None) -> dict[str, str]:
    """By BatchNorm, the layer before it."""
    flows = trace_flow(model, images(1, size=SIZE) if inputs is None else inputs)
    return {flow.batchnorm: name for name, flow in flows.items() if flow.batchnorm}


def folded_in(model: nn.Module, inputs: Tensor | None = None) -> list[str]:
    """Fold what can be folded; its names."""
    return [name for name, reason in fold_batchnorms(model, pairs_of(model, inputs)).items() if not reason]


# A layer, the BatchNorm behind it, whether it is folded, and whether the layer is quantized.
KINDS: dict[str, tuple[nn.Module, nn.Module, bool, bool]] = {
    'plain': (conv(3, 4), norm(), True, True),
    'synchronised': (conv(3, 4), nn.SyncBatchNorm(4), True, True),
    "MMEngine's SyncBN": (conv(3, 4), SyncBatchNorm(4), True, True),
    "MMEngine's without synchronisation": (conv(3, 4), revert_sync_batchnorm(nn.SyncBatchNorm(4)), True, True),
    'a subclass that activates': (conv(3, 4), BatchNormAct2d(4), False, True),
    'a BatchNorm with a hook': (conv(3, 4), hooked(norm()), False, True),
    'a BatchNorm with another forward': (conv(3, 4), forward_replaced(norm()), False, True),
    'a layer with a hook': (hooked(conv(3, 4)), norm(), False, False),
    'a layer with another forward': (forward_replaced(conv(3, 4)), norm(), False, False),
    'weight normalisation, a hook': (weight_normed(conv(3, 4)), norm(), False, False),
    'spectral normalisation, a hook': (nn.utils.spectral_norm(conv(3, 4)), norm(), False, False),
    'a parametrization': (nn.utils.parametrizations.weight_norm(conv(3, 4)), norm(), False, False),
    'weights that the layer standardises': (ConvAWS2d(3, 4, 3), norm(), False, False),
    'a layer that pads by itself': (Conv2dAdaptivePadding(3, 4, 3, stride=2, padding=1), norm(), False, False),
    'a layer that scales': (Halved(3, 4, 3), norm(), False, False),
    'padding with reflections': (conv(3, 4, padding_mode='reflect'), norm(), True, True),
    'padding by name': (nn.Conv2d(3, 4, 3, padding='same', dilation=2), norm(), True, True),
}


def model_of(layer: nn.Module, batchnorm: nn.Module) -> nn.Module:
    model = Toy(lambda m, x: m.b(m.n(m.a(x))), a=layer, n=batchnorm, b=conv(4, 2))
    return draw_batchnorms(model, seed=0)


def quantized(model: nn.Module, **changes: Any) -> Any:
    return quantize(model, QuantizationPolicy.from_config(policy(8, 8, input_size=SIZE, **changes)))


def float_output(model: Any) -> Tensor:
    """What a quantized model puts out without its quantizers."""
    model = deepcopy(model).eval()
    model._forward_pre_hooks.clear()  # it refuses to run before it is calibrated
    with without_quantizers(model):
        return output(model, images(2, size=SIZE))


@pytest.mark.parametrize('name', KINDS)
def test_no_class_loses_what_it_does_besides(name: str) -> None:
    layer, batchnorm, folds, quantizes = KINDS[name]
    model = model_of(layer, batchnorm).eval()
    before, inner = output(model, images(2, size=SIZE)), type(layer).__name__
    found = quantized(model)
    assert distance(float_output(found), before) < 1e-6
    assert found.quantization.folded == (['n'] if folds else [])
    reason = found.quantization.batchnorms['n']
    assert (reason == '') is folds
    assert [layer.policy is not None for layer in found.quantization.layers] == [quantizes, True]
    assert (f'BatchNorm not folded, {reason}: n' in found.quantization.table()) is not folds
    assert (f'behind {inner}, which has ' in found.quantization.table()) is not quantizes
    calibrate(found, [{'inputs': images(4, size=SIZE)}])
    assert distance(output(found, images(2, size=SIZE)), before) < 0.1


def test_batchnorms_that_are_left_are_listed_with_the_reason() -> None:
    grouped = nn.ConvTranspose2d(3, 6, 4, 2, 1, groups=3)
    model = Toy(
        lambda m, x: m.c(m.p(m.n(m.a(x)).relu())), a=grouped, n=nn.BatchNorm2d(6), p=nn.BatchNorm2d(6), c=conv(6, 2)
    )
    found = quantized(deepcopy(model))
    assert found.quantization.batchnorms == {'n': 'behind a grouped deconvolution', 'p': 'no layer directly before it'}
    assert 'BatchNorm not folded, no layer directly before it: p\n' in found.quantization.table()
    assert not quantized(model, fold_batchnorm=False).quantization.batchnorms


def test_a_batchnorm_under_two_names_is_left() -> None:
    """Its other name would go on calling it."""
    shared = norm()
    model = Toy(lambda m, x: m.b(m.o(m.a(x))), a=conv(3, 4), n=shared, o=shared, b=conv(4, 2))
    before = output(draw_batchnorms(model, 0), images(2, size=SIZE))
    found = quantized(model)
    assert found.quantization.batchnorms == {'n': 'it or the layer before it has several names in the model'}
    assert distance(float_output(found), before) < 1e-6


# ------------------------------------------------------------------ what is folded
# Forwards with layers a, b and BatchNorms n, o; and what may be folded into what.
FOLDS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str]]] = {
    'a chain': (lambda m, x: m.b(m.n(m.a(x)).relu()), {'a': 'n'}),
    'two': (lambda m, x: m.o(m.b(m.n(m.a(x)).relu())), {'a': 'n', 'b': 'o'}),
    'another branch reads the layer': (lambda m, x: m.n(y := m.a(x)) + y, {}),
    'another branch reads the layer before': (lambda m, x: (y := m.a(x)).relu() + m.n(y), {}),
    'the layer is an output': (lambda m, x: (y := m.a(x), m.n(y)), {}),
    'two BatchNorms read the layer': (lambda m, x: m.n(y := m.a(x)) + m.o(y), {}),
    'BatchNorm used twice': (lambda m, x: m.b(m.n(m.a(x))) + m.n(m.b(x.repeat(1, 2, 1, 1)[:, :4])), {}),
    'BatchNorm used twice in a row': (lambda m, x: m.n(m.n(m.a(x))), {}),
    'layer used twice': (lambda m, x: m.n(m.a(x)) + m.o(m.a(x * 2)), {}),
    'ReLU between': (lambda m, x: m.n(m.a(x).relu()), {}),
    'ReLU in place between': (lambda m, x: m.n(F.relu_(m.a(x))), {}),
    'a sum between': (lambda m, x: m.n(m.a(x) + x[:, :1]), {}),
    'a slice between': (lambda m, x: m.n(m.a(x)[:, [1, 0, 3, 2]]), {}),
    'BatchNorm before': (lambda m, x: m.a(nn.functional.pad(m.o(x), (1, 1))), {}),
    'dropout between, which does nothing': (lambda m, x: m.n(m.d(m.a(x))), {'a': 'n'}),
    'ReLU behind': (lambda m, x: m.b(m.n(m.a(x)).relu_()), {'a': 'n'}),
    'a residual': (lambda m, x: (y := m.a(x).relu()) + m.n(m.b(y)), {'b': 'n'}),
}


@pytest.mark.parametrize('name', FOLDS)
def test_what_is_folded_and_what_must_not_be(name: str) -> None:
    forward, expected = FOLDS[name]
    channels = 3 if name == 'BatchNorm before' else 4
    layers = dict(a=conv(3, 4), b=conv(4, 4), n=norm(), o=norm(channels), d=nn.Dropout(0.5))
    model = draw_batchnorms(Toy(forward, **layers), seed=0)
    inputs = images(2, size=(8, 8))
    before = output(model, inputs)
    assert pairs_of(model) == {norm: layer for layer, norm in expected.items()}
    assert folded_in(model) == list(expected.values())
    assert distance(output(model, inputs), before) < 1e-6


def test_what_timms_norms_do_besides_stays_and_their_checkpoints_fold() -> None:
    norm_act = pytest.importorskip('timm.layers', reason="timm is not installed: pip install 'mm_sharp[timm]'")

    def timms(seed: int) -> nn.Module:
        kinds = (nn.ReLU6, nn.PReLU)
        n, o = (norm_act.BatchNormAct2d(4, act_layer=kind, drop_layer=nn.Dropout) for kind in kinds)
        torch.manual_seed(seed)
        return draw_batchnorms(Toy(FOLDS['two'][0], a=conv(3, 4), b=conv(4, 4, groups=4), n=n, o=o), seed)

    model, other, inputs = timms(0), timms(1), 10 * images(2, size=SIZE)
    other.o.act.weight.data.fill_(0.7)
    before = output(model, inputs)
    assert folded_in(model) == ['n', 'o']
    assert distance(output(model, inputs), before) < 1e-6
    assert model.n.drop.training  # as in the float model
    assert isinstance(model.n.act, nn.ReLU6)
    model.load_state_dict(other.state_dict())
    assert distance(output(model, inputs), output(other, inputs)) < 1e-6


def test_frozen_layers_stay_frozen() -> None:
    model = Toy(FOLDS['two'][0], a=conv(3, 4, bias=False), b=conv(4, 4), n=norm(), o=norm())
    model.a.weight.requires_grad_(False)
    folded_in(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {'b.weight', 'b.bias'}
    assert 'a.bias' in dict(model.named_parameters())


# Layers in front of a BatchNorm, the BatchNorm, and whether it can be folded.
LAYER_KINDS: dict[str, tuple[nn.Module, nn.Module, bool]] = {
    'bias': (conv(3, 4), norm(), True),
    'no bias': (conv(3, 4, bias=False), norm(), True),
    'grouped': (conv(3, 6, groups=3), norm(6), True),
    'stride, dilation': (nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2), norm(), True),
    'one dimension': (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), True),
    'deconvolution': (nn.ConvTranspose2d(3, 4, 4, 2, 1), norm(), True),
    'deconvolution without bias': (nn.ConvTranspose2d(3, 4, 4, 2, 1, 1, bias=False), norm(), True),
    'deconvolution of one dimension': (nn.ConvTranspose1d(3, 4, 4, 2), nn.BatchNorm1d(4), True),
    'grouped deconvolution': (nn.ConvTranspose2d(3, 6, 4, 2, 1, groups=3), norm(6), False),
    'neither weight nor bias': (conv(3, 4), norm(affine=False), True),
    'no statistics': (conv(3, 4), norm(track_running_stats=False), False),
    'large eps': (conv(3, 4), norm(eps=0.5), True),
    'synchronised': (conv(3, 4), nn.SyncBatchNorm(4), True),
    'fully connected': (nn.Linear(8, 4), nn.BatchNorm1d(3), False),
    'weights that the layer normalises itself': (ConvWS2d(3, 4, 3), norm(), False),
    'instance norm': (conv(3, 4), nn.InstanceNorm2d(4, track_running_stats=True, affine=True), False),
}


@pytest.mark.parametrize('name', LAYER_KINDS)
def test_folding_changes_no_output(name: str) -> None:
    layer, batchnorm, folds = deepcopy(LAYER_KINDS[name])
    model = draw_batchnorms(Toy(lambda m, x: m.n(m.a(x)), a=layer, n=batchnorm), seed=0)
    if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)):
        inputs = images(2, size=(8, 8))[..., 0]
    else:
        inputs = images(2, size=(8, 8))
    before = output(model, inputs)
    folded = folded_in(model, inputs)
    assert folded == (['n'] if folds else [])
    assert isinstance(model.n, nn.Identity) is folds
    assert distance(output(model, inputs), before) < (1e-6 if folds else 1e-12)


def test_folded_layers_have_no_batch_statistics() -> None:
    """Training mode is evaluation mode."""
    model = float_model(HRNET)
    folded_in(model, images(1))
    with torch.no_grad():
        trained = model.train()(images(2), None, mode='tensor')
    assert torch.equal(trained.flatten(), output(model, images(2)))


# ------------------------------------------------------------------ folded models and their checkpoints
def folded_model(case: Case, seed: int = 0) -> nn.Module:
    model = float_model(case, seed)
    for module in model.modules():
        if type(module).__module__ == 'mmcv.cnn.bricks.wrappers':  # which torch of today does not need
            module.__class__ = type(module).__mro__[1]
    folded_in(model, images(1))
    return model


@EVERY
def test_a_folded_model_is_the_float_model(case: Case) -> None:
    model = folded_model(case)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert distance(output(model, images(2)), output(float_model(case), images(2))) <= 1e-5


@EVERY
def test_a_float_checkpoint_is_folded_while_it_is_loaded(case: Case, tmp_path: Path) -> None:
    source, inputs = float_model(case, seed=1), images(2)
    expected = output(source, inputs)
    state = source.state_dict()
    keys, first = list(state), state['backbone.' + next(iter(source.backbone.state_dict()))].clone()

    by_torch = folded_model(case)
    assert distance(output(by_torch, inputs), expected) > 0.1, 'nothing would be proven'
    result = by_torch.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert distance(output(by_torch, inputs), expected) <= 1e-5

    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'float.pth')
    by_mmengine = folded_model(case)
    load_checkpoint(by_mmengine, str(tmp_path / 'float.pth'), strict=True)
    assert same_state(by_mmengine, by_torch)

    assert list(state) == keys, 'the caller keeps the checkpoint as it was'
    assert torch.equal(state['backbone.' + next(iter(source.backbone.state_dict()))], first)


@EVERY
def test_a_checkpoint_of_the_backbone_alone_is_folded_too(case: Case, tmp_path: Path) -> None:
    """As ``init_cfg=dict(type='Pretrained', …)`` loads it, with the whole model's names and with the backbone's own."""
    source, inputs = float_model(case, seed=1), images(2)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'whole.pth')
    torch.save({'state_dict': source.backbone.state_dict()}, tmp_path / 'backbone.pth')
    expected = torch.cat([tensor.flatten() for tensor in source.eval().backbone(inputs)])
    pretrained = dict(type='Pretrained', prefix='backbone.', checkpoint=str(tmp_path / 'whole.pth'))
    own = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    for init_cfg in (pretrained, own):
        model = folded_model(case).eval()
        head = deepcopy(model.head)
        initialize(model.backbone, init_cfg)
        found = torch.cat([tensor.flatten() for tensor in model.backbone(inputs)])
        assert distance(found, expected) <= 1e-5
        assert same_state(model.head, head)


@EVERY
def test_a_folded_checkpoint_is_not_folded_again(case: Case) -> None:
    source = folded_model(case, seed=1)
    model = folded_model(case)
    result = model.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same_state(model, source)


def test_copies_and_wrapped_models_fold_what_they_load() -> None:
    source = float_model(HRNET, seed=1)
    expected = output(source, images(2))
    copy, model = deepcopy(folded_model(HRNET)), folded_model(HRNET)
    copy.load_state_dict(source.state_dict())
    assert distance(output(copy, images(2)), expected) <= 1e-5
    wrapped = nn.ModuleDict({'module': nn.ModuleList([model])})
    wrapped.load_state_dict({f'module.0.{name}': value for name, value in source.state_dict().items()})
    assert same_state(model, copy)


def test_a_batchnorm_that_the_checkpoint_lacks_is_missing() -> None:
    """Its layer is not folded, and nothing is invented: the bias, which only folding makes, is missing."""
    state = {name: value for name, value in float_model(HRNET).state_dict().items() if 'conv2' not in name}
    state |= {name: value for name, value in float_model(HRNET).state_dict().items() if name.endswith('conv2.weight')}
    state = {name: value for name, value in state.items() if not name.startswith('backbone.bn2')}
    result = folded_model(HRNET).load_state_dict(state, strict=False)
    assert result.missing_keys == ['backbone.conv2.bias']


# ------------------------------------------------------------------ the comparison with the float model
def test_a_batchnorm_that_is_taken_for_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, '_NORMS', (*folding._NORMS, BatchNormAct2d))
    with pytest.raises(ValueError, match=r'changes more in its output than by rounding: .*fold_batchnorm=False'):
        quantized(model_of(conv(3, 4), BatchNormAct2d(4)))


def test_a_layer_that_is_taken_for_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.QUANTIZED, Halved, qnn.QuantConv2d)
    with pytest.raises(ValueError, match=r'changes more in its output than by rounding: .* policy=dict\(skip=\['):
        quantized(model_of(Halved(3, 4, 3), norm()))


@pytest.mark.parametrize(
    ('use', 'message'),
    [
        (lambda m, x: F.conv2d(x, m.a.weight, padding=1), 'changes more in its output than by .*fold_batchnorm=False'),
        (lambda m, x: m.n.bias.sum(), 'does not run .*AttributeError.*fold_batchnorm=False'),
    ],
)
def test_weights_that_the_model_reads_by_itself_are_found(use: Any, message: str) -> None:
    layers = dict(a=conv(3, 4), n=norm())
    model = draw_batchnorms(Toy(lambda m, x: m.n(m.a(x)) + use(m, x), **layers), 0)
    with pytest.raises(ValueError, match=message):
        quantized(deepcopy(model))
    before = output(model, images(2, size=SIZE))
    assert distance(float_output(quantized(model, fold_batchnorm=False)), before) < 1e-6


def test_the_comparison_leaves_no_trace_and_draws_the_same_twice() -> None:
    layers = dict(a=conv(3, 4), n=norm(), b=conv(4, 4))
    model = draw_batchnorms(Toy(lambda m, x: m.b(F.dropout(m.n(m.a(x)), 0.5, training=True)), **layers), 0)
    state, float_copy = torch.get_rng_state(), deepcopy(model)
    run_in_float(model, images(1, size=SIZE))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_state(model, float_copy)
    found = quantized(model)
    assert found.training
    assert not any(module._forward_hooks for module in (found, found.a, found.n))
    assert len(uninitialised(found)) == 4


def test_what_is_not_finite_in_both_is_no_difference() -> None:
    quantized(Toy(lambda m, x: m.a(x) / 0.0, a=conv(3, 4)))
