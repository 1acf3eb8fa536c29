"""Classes that are not what they derive from, and the comparison of a quantized model with its float one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.quantization import QuantizationPolicy, calibrate, folding, quantize
from mm_sharp.quantization.float_outputs import FloatOutputs, without_quantizers
from mm_sharp.quantization.guard import uninitialised
from tests.mmpose_cases import QUIET
from tests.quantized_models import Toy, conv, distance, draw_batchnorms, images, output, policy
from tests.toys import same_state

pytestmark = QUIET
SIZE = (8, 8)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: it drops blocks and activates, too."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.ReLU6()

    def forward(self, inputs: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(inputs)))
        return activated


class TimmNorm(BatchNormAct2d):
    """One that is known by its name."""


TimmNorm.__module__, TimmNorm.__name__ = 'timm.layers.norm_act', 'BatchNormAct2d'


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


def norm(**kwargs: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **kwargs)


# A layer, the BatchNorm behind it, whether it is folded, and whether the layer is quantized.
KINDS: dict[str, tuple[nn.Module, nn.Module, bool, bool]] = {
    'plain': (conv(3, 4), norm(), True, True),
    'synchronised': (conv(3, 4), nn.SyncBatchNorm(4), True, True),
    "MMEngine's SyncBN": (conv(3, 4), SyncBatchNorm(4), True, True),
    "MMEngine's without synchronisation": (conv(3, 4), revert_sync_batchnorm(nn.SyncBatchNorm(4)), True, True),
    'a subclass that activates': (conv(3, 4), BatchNormAct2d(4), False, True),
    "timm's, ReLU6": (conv(3, 4), TimmNorm(4), True, True),
    "timm's, PReLU": (conv(3, 4), TimmNorm(4, nn.PReLU(4, init=0.3)), True, True),
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
    model = copy.deepcopy(model).eval()
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
    assert list(found.quantization.unfolded) == ([] if folds else ['n'])
    assert [layer.policy is not None for layer in found.quantization.layers] == [quantizes, True]
    assert (
        f'BatchNorm not folded, {found.quantization.unfolded.get("n")}: n' in found.quantization.table()
    ) is not folds
    assert (f'behind {inner}, which has ' in found.quantization.table()) is not quantizes
    calibrate(found, [{'inputs': images(4, size=SIZE)}])
    assert distance(output(found, images(2, size=SIZE)), before) < 0.1


def test_the_weights_of_a_kept_activation_are_loaded_by_their_names() -> None:
    source = model_of(conv(3, 4), TimmNorm(4, nn.PReLU(4)))
    nn.init.uniform_(source.n.act.weight, 0.1, 0.9)
    found = quantized(model_of(conv(3, 4), TimmNorm(4, nn.PReLU(4))))
    found.load_state_dict(source.state_dict(), strict=False)
    assert distance(float_output(found), output(source, images(2, size=SIZE))) < 1e-6


def test_batchnorms_that_are_left_are_listed_with_the_reason() -> None:
    grouped = nn.ConvTranspose2d(3, 6, 4, 2, 1, groups=3)
    model = Toy(
        lambda m, x: m.c(m.p(m.n(m.a(x)).relu())), a=grouped, n=nn.BatchNorm2d(6), p=nn.BatchNorm2d(6), c=conv(6, 2)
    )
    found = quantized(copy.deepcopy(model))
    assert found.quantization.unfolded == {'n': 'behind a grouped deconvolution', 'p': 'no layer directly before it'}
    assert 'BatchNorm not folded, no layer directly before it: p\n' in found.quantization.table()
    assert not quantized(model, fold_batchnorm=False).quantization.unfolded


def test_a_batchnorm_under_two_names_is_left() -> None:
    """Its other name would go on calling it."""
    shared = norm()
    model = Toy(lambda m, x: m.b(m.o(m.a(x))), a=conv(3, 4), n=shared, o=shared, b=conv(4, 2))
    before = output(draw_batchnorms(model, 0), images(2, size=SIZE))
    found = quantized(model)
    assert found.quantization.unfolded == {'n': 'it or the layer before it has several names in the model'}
    assert distance(float_output(found), before) < 1e-6


# ------------------------------------------------------------------ the comparison
@pytest.mark.parametrize('zero', [False, True])
def test_a_class_that_is_taken_for_another_is_refused(monkeypatch: pytest.MonkeyPatch, zero: bool) -> None:
    """Named, even where a weight that starts at 0 keeps the output as it was."""
    monkeypatch.setattr(folding, '_NORMS', (*folding._NORMS, BatchNormAct2d))
    model = model_of(conv(3, 4), BatchNormAct2d(4))
    if zero:
        nn.init.zeros_(model.b.weight)
    with pytest.raises(ValueError, match=r'changes n \(BatchNormAct2d\) by .* write policy=dict\(fold_batchnorm=False'):
        quantized(model)


def test_a_layer_that_is_taken_for_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import brevitas.nn as qnn

    from mm_sharp.quantization import build

    monkeypatch.setitem(build._QUANTIZED, Halved, qnn.QuantConv2d)
    with pytest.raises(ValueError, match=r"changes a \(Halved\) by 1 of its .* write policy=dict\(skip=\['\^a\$'\]"):
        quantized(model_of(Halved(3, 4, 3), norm()))


@pytest.mark.parametrize(
    ('use', 'message'),
    [
        (lambda m, x: F.conv2d(x, m.a.weight, padding=1), "changes the model's output by .*fold_batchnorm=False"),
        (lambda m, x: m.n.bias.sum(), 'does not run .*AttributeError.*fold_batchnorm=False'),
    ],
)
def test_weights_that_the_model_reads_by_itself_are_found(use: Any, message: str) -> None:
    layers = dict(a=conv(3, 4), n=norm())
    model = draw_batchnorms(Toy(lambda m, x: m.n(m.a(x)) + use(m, x), **layers), 0)
    with pytest.raises(ValueError, match=message):
        quantized(copy.deepcopy(model))
    before = output(model, images(2, size=SIZE))
    assert distance(float_output(quantized(model, fold_batchnorm=False)), before) < 1e-6


def test_the_comparison_leaves_no_trace_and_draws_what_the_float_model_drew() -> None:
    model = draw_batchnorms(Toy(lambda m, x: F.dropout(m.n(m.a(x)), 0.5, training=True), a=conv(3, 4), n=norm()), 0)
    float_copy, state = copy.deepcopy(model), torch.get_rng_state()
    outputs = FloatOutputs(model, images(1, size=SIZE))
    assert same_state(model, float_copy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # what building may draw
    state = torch.get_rng_state()
    outputs.check(model, {})
    assert torch.equal(torch.get_rng_state(), state)
    found = quantized(model)
    assert found.training
    assert not any(module._forward_hooks for module in (found, found.a, found.n))
    assert len(uninitialised(found)) == 2


def test_what_is_not_finite_in_both_is_no_difference() -> None:
    model = Toy(lambda m, x: m.a(x) / 0.0, a=conv(3, 4))
    outputs = FloatOutputs(model, images(1, size=SIZE))
    outputs.check(model, {})
    model.run = lambda m, x: m.a(x)
    with pytest.raises(ValueError, match="changes the model's output by inf"):
        outputs.check(model, {})
