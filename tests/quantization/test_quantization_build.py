"""The quantized model: what stays as it was, and what its layers compute, against the same by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.quantization import (
    QuantizationPolicy,
    calibrate,
    check_calibrated,
    is_calibrated,
    quantize,
    quantized_model,
)
from mm_sharp.quantization.layers import QuantConv2d
from mm_sharp.quantization.record import LAYOUT
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import (
    DECONV,
    EVERY,
    HRNET,
    RLE,
    RTMPOSE,
    SIMCC,
    SIZE,
    Toy,
    calibrated,
    conv,
    draw_batchnorms,
    float_model,
    images,
    output,
    policy,
    quantized,
    samples,
    to_read,
)
from tests.toys import same_state

pytestmark = QUIET
QUANTIZED = (qnn.QuantConv1d, qnn.QuantConv2d, qnn.QuantConvTranspose1d, qnn.QuantConvTranspose2d, qnn.QuantLinear)


@pytest.fixture(autouse=True)
def _in_mmpose() -> None:
    init_default_scope('mmpose')


def is_scale(name: str) -> bool:
    return 'tensor_quant' in name


# ------------------------------------------------------------------ what stays
@EVERY
def test_the_class_its_parts_and_its_names_stay(case: Case) -> None:
    source, model = float_model(case), quantized(case, fold_batchnorm=False)
    assert type(model) is type(source)
    assert type(model).__name__ == 'TopdownPoseEstimator'
    assert type(model.backbone) is type(source.backbone)
    assert type(model.head) is type(source.head)
    assert model.training
    names = [name for name, _ in model.named_parameters() if not is_scale(name)]
    assert sorted(names) == sorted(name for name, _ in source.named_parameters())
    assert {name for name in model.state_dict() if not is_scale(name)} == {*source.state_dict(), LAYOUT}
    state = model.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(state[name], value), name
    assert not model.quantization.folded


@EVERY
def test_folding_takes_batchnorms_names_and_adds_biases(case: Case) -> None:
    source, model = float_model(case), to_read(case)
    norms = {name for name, module in source.named_modules() if isinstance(module, _BatchNorm)}
    assert set(model.quantization.folded) == norms
    kept = {name for name in source.state_dict() if name.rpartition('.')[0] not in norms}
    biases = {f'{layer.name}.bias' for layer in model.quantization.layers}
    found = {name for name in model.state_dict() if not is_scale(name)}
    assert kept - {LAYOUT} <= found
    assert found - kept - {LAYOUT} <= biases


@EVERY
def test_every_layer_of_inference_is_quantized(case: Case) -> None:
    """Deconvolutions in mmcv's wrappers, depthwise convolutions and ConvModules among them."""
    model = to_read(case)
    left = [layer.name for layer in model.quantization.layers if layer.policy is None]
    assert all(name.startswith('head.loss_module.flow_model') for name in left)
    layers = dict(model.named_modules())
    assert all(isinstance(layers[layer.name], QUANTIZED) for layer in model.quantization.quantized)
    plain = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert sum(not isinstance(module, QUANTIZED) for module in plain) == len(left)
    kinds = {layer.kind for layer in model.quantization.quantized}
    assert ('ConvTranspose2d' in kinds) is (case in (SIMCC, DECONV))
    assert ('Linear' in kinds) is (case in (SIMCC, RLE, RTMPOSE))
    if case in (RLE, RTMPOSE):
        assert any(isinstance(m, qnn.QuantConv2d) and m.groups == m.in_channels > 3 for m in model.modules())


def test_frozen_stages_stay_frozen_with_their_scales() -> None:
    """They would be frozen again on entering training mode: then too late for the optimizer and for DDP."""
    source = float_model(SIMCC, frozen_stages=2)
    model = quantize(deepcopy(source), QuantizationPolicy.from_config(policy()))
    frozen = {name.rpartition('.')[0] for name, p in source.named_parameters() if not p.requires_grad}
    frozen &= {layer.name for layer in model.quantization.quantized}
    assert 'backbone.conv1' in frozen
    assert not any(name.startswith(('backbone.layer3', 'head')) for name in frozen)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, flag in flags.items():
        layer = name.partition('.weight_quant')[0].partition('.input_quant')[0]
        layer = layer if is_scale(name) else name.rpartition('.')[0]
        assert flag is (layer not in frozen), name
    model.train(False)
    model.train(True)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@EVERY
def test_training_reaches_every_weight_and_scale(case: Case) -> None:
    cfg = case.config()
    model = calibrated(case).train()
    calls = []
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4)))
    wrapper.zero_grad = lambda: calls.append(1)  # keeps the gradients
    losses = model.train_step(case.batch(cfg), wrapper)
    assert bool(losses['loss'].isfinite())
    assert calls
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    reached = [bool(parameter.grad.any()) for name, parameter in model.named_parameters() if is_scale(name)]
    assert sum(reached) > 0.9 * len(reached)


@EVERY
def test_it_predicts_keypoints(case: Case) -> None:
    model, batch = to_read(case, weight=8, act=8), case.batch(case.config())
    model.eval()
    results = model.val_step(deepcopy(batch))
    expected = float_model(case).eval().val_step(deepcopy(batch))
    model.train()
    for result, other in zip(results, expected, strict=True):
        assert result.pred_instances.keypoints.shape == other.pred_instances.keypoints.shape == (1, 17, 2)


@EVERY
def test_eight_bits_are_close_to_the_float_model_and_four_less_so(case: Case) -> None:
    expected = output(float_model(case), images(2))
    found = (output(to_read(case, **bits), images(2)) for bits in (dict(weight=8, act=8), {}))
    eight, four = (float((outputs - expected).norm() / expected.norm()) for outputs in found)
    assert eight < 0.03
    assert eight < 0.7 * four


# ------------------------------------------------------------------ ways to ask for it
def config(case: Case) -> dict[str, Any]:
    return dict(Config(case.config().model.to_dict())._cfg_dict)


@pytest.mark.slow
def test_both_forms_of_a_config_and_a_model_give_the_same() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = quantized_model(MODELS.build(config(DECONV)), policy())
    inner = config(DECONV)
    kind = inner.pop('type')
    forms: list[dict[str, Any]] = [
        dict(type='QuantizedModel', model=config(DECONV), policy=policy()),
        dict(type='QuantizedModel', model=kind, policy=policy(), **inner),
        # Keys beside a config are set in it.
        dict(type='QuantizedModel', model={**config(DECONV), 'head': None}, head=inner['head'], policy=policy()),
        dict(type='mmengine.QuantizedModel', model=f'mmpose.{kind}', policy=policy(), **inner),
    ]
    for form in forms:
        copy = deepcopy(form)
        torch.manual_seed(0)
        model = MODELS.build(form)
        assert form == copy, 'the config is left as it was'
        assert type(model).__name__ == 'TopdownPoseEstimator'
        assert same_state(model, given)
        assert model.quantization.layers == given.quantization.layers


def test_the_scope_of_a_config_is_kept() -> None:
    with DefaultScope.overwrite_default_scope('mmengine'):
        inner = config(DECONV)
        model = MODELS.build(
            {**inner, 'type': 'QuantizedModel', 'model': inner['type'], 'policy': policy(), '_scope_': 'mmpose'}
        )
    assert type(model).__name__ == 'TopdownPoseEstimator'


def test_a_model_that_is_built_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match=r"QuantizedModel: \['head'\] cannot be set in a model that is built already"):
        quantized_model(float_model(HRNET), policy(), head=None)


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match='QuantizedModel: the model is quantized already'):
        quantized_model(to_read(SIMCC), policy())


def test_an_unknown_input_size_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r'write policy=dict\(input_size=\(width, height\), …\)'):
        quantized_model(Toy(lambda m, x: m.a(x), a=conv(3, 4)), policy())
    model = float_model(HRNET)
    model.head.decoder = None
    with pytest.raises(ValueError, match='the size of the input is not known'):
        quantized_model(model, policy())
    assert quantized_model(model, policy(input_size=(96, 32))).quantization.input_size == (96, 32)
    assert to_read(SIMCC).quantization.input_size == SIZE


def test_what_is_not_quantized_is_said_with_its_reason() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    layers = dict(a=conv(3, 4), b=Doubled(4, 4, 1), c=conv(4, 4), d=nn.Linear(3, 3))
    model = quantized_model(
        Toy(lambda m, x: m.c(m.b(m.a(x))), **layers), policy(input_size=(8, 8), last_layers='float')
    )
    reasons = {layer.name: layer.reason for layer in model.quantization.layers}
    assert reasons == {
        'a': '',
        'b': 'Doubled has hooks or a forward of its own',
        'c': 'last layer (policy)',
        'd': 'not called in inference',
    }
    assert [type(getattr(model, name)) for name in 'abcd'] == [QuantConv2d, Doubled, nn.Conv2d, nn.Linear]


def test_one_layer_under_two_names_is_one_layer() -> None:
    shared = conv(4, 4)
    model = Toy(lambda m, x: m.second(m.first(m.a(x).relu()).relu()), a=conv(3, 4), first=shared, second=shared)
    model = quantized_model(model, policy(input_size=(8, 8)))
    assert model.first is model.second
    assert isinstance(model.second, qnn.QuantConv2d)
    assert [layer.name for layer in model.quantization.layers] == ['a', 'first']


# ------------------------------------------------------------------ copies
def test_a_copy_is_equal_and_independent() -> None:
    model = calibrated(SIMCC)
    copy, expected = deepcopy(model), output(model, images(2))
    assert torch.equal(output(copy, images(2)), expected)
    assert is_calibrated(copy)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(output(model, images(2)), expected)
    assert not torch.equal(output(copy, images(2)), expected)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copy.parameters()}
    assert not shared


def test_a_copy_is_calibrated_by_itself() -> None:
    model = quantized(SIMCC)
    copy = deepcopy(model)
    calibrate(model, samples(1))
    check_calibrated(model)
    assert not is_calibrated(copy)
    with pytest.raises(RuntimeError, match='has not been calibrated'):
        output(copy, images(1))
    calibrate(copy, samples(1))
    assert torch.equal(output(copy, images(1)), output(model, images(1)))


# ------------------------------------------------------------------ sizes
SIZES = [(SIMCC, {}), (HRNET, {}), (RLE, {}), (RTMPOSE, {}), (RTMPOSE, dict(weight=2, fold_batchnorm=False))]
SIZES.append((RTMPOSE, dict(weight_symmetric=False, act_symmetric=False, weight_granularity='tensor')))


@pytest.mark.parametrize(
    ('case', 'changes'),
    [
        pytest.param(case, own, id=f'{case.name} {own}', marks=() if case is SIMCC and not own else pytest.mark.slow)
        for case, own in SIZES
    ],
)
def test_the_size_is_that_of_the_checkpoint_with_fewer_bits(case: Case, changes: dict[str, Any]) -> None:
    model = to_read(case, **changes)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != LAYOUT}
    bits = 0
    for layer in model.quantization.quantized:
        assert layer.policy is not None
        weight = state.pop(f'{layer.name}.weight')
        assert weight.numel() == layer.weights
        bits += weight.numel() * layer.policy.weight_bit_width
    other = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert model.quantization.bytes() == (bits + 7) // 8 + other
    saved = float_model(case).state_dict().values()
    assert model.quantization.float_bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert model.quantization.bytes() < model.quantization.float_bytes


@pytest.mark.slow
def test_the_report_says_what_there_is() -> None:
    record = quantized(RLE, act=6).quantization
    lines = record.table().splitlines()
    assert len(lines) == 1 + len(record.layers) + 3
    assert [line.split()[0] for line in lines[1:-3]] == [layer.name for layer in record.layers]
    assert lines[1].split()[1:] == ['216', '8', '8', 'signed']
    assert lines[2].split()[1:] == ['72', '4', '6', 'unsigned']
    share = sum(layer.weights for layer in record.quantized) / sum(layer.weights for layer in record.layers)
    assert lines[-3] == f'53 of 89 layers are quantized, {share:.1%} of their weights; 52 BatchNorms are folded'
    assert f'size {record.float_bytes / 1e6:.2f} MB in float, {record.bytes() / 1e6:.2f} MB quantized' in lines[-2]


# ------------------------------------------------------------------ what layers compute
def zoo() -> Toy:
    """Every kind of layer, signed and unsigned inputs."""

    def forward(model: Any, inputs: Tensor) -> Tensor:
        values = model.depthwise(model.plain(inputs).relu())
        values = model.strided(model.deconv(values).relu())
        lines = model.undo(model.line(values.flatten(2)).relu())
        return model.full(lines.mean(2)) + model.grouped(values).mean((2, 3))[:, :3]

    layers = dict(
        plain=conv(3, 4),
        depthwise=conv(4, 4, groups=4, bias=False),
        deconv=nn.ConvTranspose2d(4, 6, 4, 2, 1, 1),
        strided=nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, padding_mode='reflect'),
        line=nn.Conv1d(4, 5, 3),
        undo=nn.ConvTranspose1d(5, 4, 3, bias=False),
        full=nn.Linear(4, 3),
        grouped=nn.ConvTranspose2d(4, 6, 3, groups=2),
    )
    return Toy(forward, **layers)


def calls_of(model: nn.Module, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By quantized layer, what it took in and gave out."""
    calls = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
        for name, module in model.named_modules()
        if isinstance(module, QUANTIZED)
    ]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


SIGNED = {'plain', 'deconv', 'line', 'full', 'grouped'}
TOY_BATCHES = [{'inputs': images(4, seed, (8, 8))} for seed in range(3)]


def quantized_zoo(scale_init: str = 'max', **changes: Any) -> tuple[Toy, nn.Module]:
    """The float model and its copy, quantized and calibrated."""
    torch.manual_seed(0)
    source = zoo()
    ends = dict(first_layers='same', last_layers='same', input_size=(8, 8))
    model = quantized_model(deepcopy(source), {**policy(**changes), **ends, 'scale_init': scale_init})
    calibrate(model, TOY_BATCHES)
    return source, model


def rounded(values: Tensor, largest: Tensor, bits: int, kind: str) -> Tensor:
    """Quantization by hand. Weights leave the lowest integer out; inputs use all."""
    low, high, steps = {
        'weight': (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1),
        'signed': (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 1)),
        'unsigned': (0, 2**bits - 1, 2**bits - 1),
    }[kind]
    scale = largest / steps
    return (values / scale).round().clamp(low, high) * scale


def largest_of(layer: nn.Module, part: str) -> Tensor:
    """The parameter that a scale is made of: what the largest integer stands for."""
    (value,) = (p for name, p in layer.named_parameters() if name.startswith(part) and 'scaling_impl.value' in name)
    return value


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize(('weight', 'act'), [(8, 8), (4, 4), (3, 6), (2, 2)])
def test_layers_compute_what_is_computed_by_hand(weight: int, act: int, granularity: str) -> None:
    source, model = quantized_zoo(weight=weight, act=act, weight_granularity=granularity)
    record = {layer.name: layer for layer in model.quantization.layers}
    calls = calls_of(model, images(4, 9, (8, 8)) * 1.5)
    assert calls.keys() == record.keys() == dict(source.named_children()).keys()
    for name, (taken, made) in calls.items():
        layer, plain = getattr(model, name), deepcopy(getattr(source, name))
        kind = 'signed' if name in SIGNED else 'unsigned'
        assert record[name].input_range == kind
        inputs = rounded(taken, largest_of(layer, 'input_quant'), act, kind)
        assert len(inputs.unique()) <= 2**act
        with torch.no_grad():
            plain.weight.copy_(rounded(plain.weight, largest_of(layer, 'weight_quant'), weight, 'weight'))
            expected = plain(inputs)
        assert torch.equal(layer.quant_weight().value, plain.weight)
        assert torch.allclose(made, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())), name


@pytest.mark.parametrize(('weight', 'levels'), [(2, 3), (4, 15)])
def test_weights_have_few_levels_in_each_channel(weight: int, levels: int) -> None:
    model = quantized_zoo(weight=2)[1] if weight == 2 else to_read(SIMCC)
    counts = []
    for record in model.quantization.quantized:
        if record.policy is None or record.policy.weight_bit_width != weight:
            continue
        values = model.get_submodule(record.name).quant_weight().value.detach()
        values = values.transpose(0, 1) if 'Transpose' in record.kind else values
        counts += [len(channel.unique()) for channel in values]
    assert max(counts) == levels
    assert len(counts) > 25


def test_shapes_of_scales() -> None:
    for granularity in ('channel', 'tensor'):
        source, model = quantized_zoo(weight_granularity=granularity)
        for name, layer in source.named_children():
            scale = largest_of(getattr(model, name), 'weight_quant')
            grouped = isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            assert scale.numel() == (outputs if granularity == 'channel' and not grouped else 1), name
            assert largest_of(getattr(model, name), 'input_quant').numel() == 1
        records = {layer.name: layer.policy.weight_granularity for layer in model.quantization.quantized}
        assert records == dict.fromkeys(records, granularity) | {'grouped': 'tensor'}


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize(('bits', 'init'), [(2, 'max'), pytest.param(4, 'mse', marks=pytest.mark.slow)])
def test_asymmetric_weights_and_inputs(bits: int, init: str, granularity: str) -> None:
    """Integers from 0, one of which stands for zero; what is in range is off by half a step at most."""
    changes = dict(weight=bits, act=bits, weight_symmetric=False, act_symmetric=False, weight_granularity=granularity)
    _, model = quantized_zoo(**changes, scale_init=init)
    record = {layer.name: layer.input_range for layer in model.quantization.layers}
    assert record == {name: 'shifted' if name in SIGNED else 'unsigned' for name in record}
    for name, (taken, _) in calls_of(model, images(4, 0, (8, 8))).items():
        layer = getattr(model, name)
        parts = [(layer.weight, layer.quant_weight())]
        if name in SIGNED:
            parts.append((taken, layer.input_quant(taken)))
        for values, found in parts:
            integers = found.value / found.scale + found.zero_point
            assert torch.allclose(integers, integers.round(), atol=1e-3)
            integers = integers.round()
            assert bool(((integers >= 0) & (integers <= 2**bits - 1)).all())
            assert bool(((found.zero_point >= 0) & (found.zero_point <= 2**bits - 1)).all())
            assert torch.equal(found.zero_point, found.zero_point.round())
            inside = (integers > 0) & (integers < 2**bits - 1)
            assert bool(((values - found.value).abs() <= 0.501 * found.scale)[inside].all())


# ------------------------------------------------------------------ where scales come from
def test_maxima() -> None:
    """Weights: the largest. Inputs: the largest of each batch (of fewer than 100,000 numbers), averaged."""
    source, model = quantized_zoo()
    found: dict[str, list[float]] = {}
    for name, module in source.named_children():
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(float(args[0].abs().max()))
        )
    for batch in TOY_BATCHES:
        output(source, batch['inputs'])
    for name, layer in source.named_children():
        largest = largest_of(getattr(model, name), 'input_quant').item()
        assert largest == pytest.approx(sum(found[name]) / 3, rel=1e-5)
        weight = layer.weight.transpose(0, 1) if name in ('deconv', 'undo') else layer.weight
        expected = weight.abs().max() if name == 'grouped' else weight.flatten(1).abs().amax(1)
        assert torch.equal(largest_of(getattr(model, name), 'weight_quant').flatten(), expected.flatten())


@pytest.mark.slow
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_scales_of_least_squared_error_have_less_of_it_than_maxima(bits: int) -> None:
    (source, maxima), (_, least) = (quantized_zoo(weight=bits, act=bits, scale_init=i) for i in ('max', 'mse'))
    for name, layer in source.named_children():
        found = (getattr(model, name).quant_weight().value for model in (maxima, least))
        errors = [(value - layer.weight).square().sum().item() for value in found]
        assert errors[1] <= errors[0]
    if bits == 2:
        assert errors[1] < 0.8 * errors[0]


def test_fixed_scales_of_inputs_are_not_trained() -> None:
    _, model = quantized_zoo(act_scales='fixed')
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {name for name in flags if '.input_quant.' in name}
    _, learned = quantized_zoo()
    assert all(parameter.requires_grad for parameter in learned.parameters())


def test_scales_from_statistics_follow_the_weights() -> None:
    _, model = quantized_zoo(weight=4, weight_scales='statistics')
    assert not any('weight_quant' in name for name, _ in model.named_parameters())
    before = model.plain.quant_weight().scale
    with torch.no_grad():
        model.plain.weight[1] *= 3
    after = model.plain.quant_weight().scale
    assert torch.allclose(after.flatten(), before.flatten() * torch.tensor([1, 3, 1, 1]))
    assert torch.allclose(after.flatten(), model.plain.weight.flatten(1).abs().amax(1) / 7)


def test_learned_scales_stay_where_they_are_when_weights_move() -> None:
    _, model = quantized_zoo(weight=4)
    before = model.plain.quant_weight().scale
    with torch.no_grad():
        model.plain.weight[1] *= 3
    assert torch.equal(model.plain.quant_weight().scale, before)


def test_norms_that_are_not_folded_keep_their_statistics() -> None:
    model = draw_batchnorms(Toy(lambda m, x: m.n(m.a(x).relu()), a=conv(3, 4), n=nn.BatchNorm2d(4)), seed=0)
    before = {name: buffer.clone() for name, buffer in model.n.named_buffers()}
    model = quantized_model(model, policy(input_size=(8, 8)))
    calibrate(model, TOY_BATCHES)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.n.named_buffers())
    made = model.train()(images(4, 0, (8, 8)))
    assert torch.allclose(made.mean((0, 2, 3)), model.n.bias, atol=1e-5)
    assert not torch.equal(model.n.running_mean, before['running_mean'])
    assert torch.equal(F.relu(made), made.relu())
