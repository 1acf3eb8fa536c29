"""Which layer takes in what, and BatchNorm folded: against what is observed, and against the float model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.quantization.flow import LAYERS, trace_flow
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import (
    DECONV,
    EVERY,
    HRNET,
    RLE,
    RTMPOSE,
    SIMCC,
    Toy,
    conv,
    draw_batchnorms,
    float_model,
    images,
    output,
)
from tests.toys import same_state

pytestmark = QUIET


def flows_of(model: nn.Module, inputs: Tensor | None = None) -> dict[str, Any]:
    return trace_flow(model, images(1, size=(8, 8)) if inputs is None else inputs)


def names_of(flows: dict[str, Any], field: str) -> set[str]:
    return {name for name, flow in flows.items() if getattr(flow, field)}


def pairs_of(flows: dict[str, Any]) -> dict[str, str]:
    """By BatchNorm, the layer before it."""
    return {flow.batchnorm: name for name, flow in flows.items() if flow.batchnorm}


def smallest_inputs(model: nn.Module, inputs: Callable[[int], Tensor], rounds: int) -> dict[str, float]:
    """The smallest number that each layer takes in, over random inputs and random BatchNorms."""
    smallest: dict[str, float] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            smallest[name] = min(smallest.get(name, 0.0), float(args[0].min()))

        return note

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    for number in range(rounds):
        output(draw_batchnorms(model, seed=100 + number), inputs(number))
    for handle in handles:
        handle.remove()
    return smallest


# ------------------------------------------------------------------ the architectures
FIRST = {'ResNet': 'backbone.conv1', 'HRNet': 'backbone.conv1', 'MobileNetV2': 'backbone.conv1.conv'}
LAST = {SIMCC: {'head.mlp_head_x', 'head.mlp_head_y'}, DECONV: {'head.final_layer'}, HRNET: {'head.final_layer'}}
LAST |= {RLE: {'head.fc'}, RTMPOSE: {'head.cls_x', 'head.cls_y'}}


@EVERY
def test_first_and_last_layers(case: Case) -> None:
    flows = flows_of(float_model(case), images(1))
    assert names_of(flows, 'first') == {FIRST.get(case.name.split('-')[0], 'backbone.stem.0.conv')}
    assert names_of(flows, 'last') == LAST[case]


@EVERY
def test_what_is_said_to_be_nonnegative_is_and_nothing_else_is(case: Case) -> None:
    model = float_model(case)
    flows = flows_of(model, images(1))
    smallest = smallest_inputs(model, lambda number: images(2, number), rounds=3)
    assert smallest.keys() == flows.keys()
    assert names_of(flows, 'nonnegative') == {name for name, value in smallest.items() if value >= 0}


@pytest.mark.parametrize('case', [SIMCC, DECONV, HRNET, RLE], ids=lambda case: case.name)
def test_behind_a_relu_all_is_nonnegative(case: Case) -> None:
    """By the structure of these networks: MobileNetV2's blocks end without a ReLU, and so does SimCC's convolution."""
    flows = flows_of(float_model(case), images(1))
    signed = flows.keys() - names_of(flows, 'nonnegative')
    image = {FIRST[case.name.split('-')[0]]}
    if case is RLE:
        blocks = {name for name in flows if name.endswith('.conv.0.conv')} - {'backbone.layer1.0.conv.0.conv'}
        assert signed == {*image, *blocks, 'backbone.conv2.conv'}
    else:
        assert signed == image | (LAST[SIMCC] if case is SIMCC else set())


@EVERY
def test_layers_that_inference_does_not_call(case: Case) -> None:
    model = float_model(case)
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    unused = layers - flows_of(model, images(1)).keys()
    assert all(name.startswith('head.loss_module.flow_model') for name in unused)
    assert len(unused) == (36 if case is RLE else 0)


def behind(layer: str) -> str:
    """The BatchNorm behind a layer, by the names that MMPose's blocks use."""
    head, _, last = layer.rpartition('.')
    if last == 'conv':
        return f'{head}.bn'
    if last.isdecimal():
        return f'{head}.{int(last) + 1}'
    return f'{head}.bn{last[-1]}'


@EVERY
def test_every_batchnorm_is_found_behind_its_layer(case: Case) -> None:
    model = float_model(case)
    pairs = pairs_of(flows_of(model, images(1)))
    assert pairs == {behind(layer): layer for layer in pairs.values()}
    assert set(pairs) == {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@pytest.mark.parametrize('case', [SIMCC, HRNET, RLE], ids=lambda case: case.name)
def test_activation_checkpointing_hides_nothing(case: Case) -> None:
    plain, checkpointed = float_model(case), float_model(case, with_cp=True)
    marked = [module for module in checkpointed.modules() if getattr(module, 'with_cp', False)]
    assert len(marked) > 5
    assert flows_of(checkpointed, images(1)) == flows_of(plain, images(1))
    assert all(module.with_cp for module in marked)


# ------------------------------------------------------------------ the model afterwards
def test_the_model_is_left_as_it_was() -> None:
    model = float_model(SIMCC)
    model.backbone.layer1.eval()
    model.backbone.conv1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    copy, state, inputs = deepcopy(model), torch.get_rng_state(), images(1)
    flows_of(model, inputs)
    assert same_state(model, copy)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in copy.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, images(1))
    assert not inputs.requires_grad


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    def fail(model: Any, inputs: Tensor) -> Tensor:
        model.a(inputs)
        raise RuntimeError('mine')

    model = Toy(fail, a=conv(3, 4), n=nn.BatchNorm2d(4)).train()
    model.with_cp = True
    with pytest.raises(RuntimeError, match='mine'):
        flows_of(model)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert model.with_cp is True


def test_a_model_that_writes_into_its_input() -> None:
    inputs = images(1, size=(8, 8))
    flows = flows_of(Toy(lambda m, x: m.b(m.a(x.sub_(0.5)).relu_()), a=conv(3, 4), b=conv(4, 4)), inputs)
    assert (names_of(flows, 'first'), names_of(flows, 'nonnegative')) == ({'a'}, {'b'})
    assert torch.equal(inputs, images(1, size=(8, 8)))


# ------------------------------------------------------------------ signs
# What layer b takes in, made of the outputs of layers a and c; and whether it cannot be negative.
SIGNS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    'nothing between': (lambda a, c: a, False),
    'ReLU': (lambda a, c: a.relu(), True),
    'ReLU in place': (lambda a, c: F.relu_(a), True),
    'ReLU6': (lambda a, c: F.relu6(a), True),
    'ReLU6 in place': (lambda a, c: nn.ReLU6(inplace=True)(a), True),
    'hardtanh around 0': (lambda a, c: F.hardtanh(a), False),
    'hardswish': (lambda a, c: F.hardswish(a), False),
    'SiLU': (lambda a, c: F.silu(a), False),
    'GELU': (lambda a, c: F.gelu(a), False),
    'leaky ReLU': (lambda a, c: F.leaky_relu(a, 0.1), False),
    'PReLU': (lambda a, c: F.prelu(a, torch.full((1,), 0.2)), False),
    'ELU': (lambda a, c: F.elu(a), False),
    'sigmoid': (lambda a, c: a.sigmoid(), True),
    'hardsigmoid': (lambda a, c: F.hardsigmoid(a), True),
    'softmax': (lambda a, c: a.softmax(1), True),
    'softplus': (lambda a, c: F.softplus(a), True),
    'square': (lambda a, c: a.square(), True),
    'cube': (lambda a, c: a**3, False),
    'fourth power of what is negative': (lambda a, c: (-a.relu()) ** 4, True),
    'size': (lambda a, c: a.abs(), True),
    'exponential': (lambda a, c: a.exp(), True),
    'clamped from 0': (lambda a, c: a.clamp(min=0), True),
    'clamped from below 0': (lambda a, c: a.clamp(-0.1, 1), False),
    'clamped from above': (lambda a, c: a.clamp(max=1), False),
    'threshold that puts in a negative number': (lambda a, c: F.threshold(a, -9.0, -5.0), False),
    'gate on signed values': (lambda a, c: a * c.sigmoid(), False),
    'gate on nonnegative values': (lambda a, c: a.relu() * c.sigmoid(), True),
    'concatenation of signed and unsigned': (lambda a, c: torch.cat([a.relu(), c], 1)[:, 2:6], False),
    'concatenation of unsigned': (lambda a, c: torch.cat([a.relu(), c.abs()], 1)[:, 2:6], True),
    'residual of signed': (lambda a, c: a.relu() + c, False),
    'residual of signed in place': (lambda a, c: a.relu().add_(c), False),
    'residual of unsigned': (lambda a, c: a.relu() + c.relu(), True),
    'residual of unsigned in place': (lambda a, c: a.relu().add_(c.relu()), True),
    'sum with a negative factor': (lambda a, c: torch.add(a.relu(), c.relu(), alpha=-1), False),
    'subtraction': (lambda a, c: a.relu() - c.relu(), False),
    'negation': (lambda a, c: -a.relu(), False),
    'negative scaling': (lambda a, c: a.relu() * -2.0, False),
    'scaling by a signed parameter': (lambda a, c: a.relu() * nn.Parameter(torch.tensor([-1.0])), False),
    'a number subtracted': (lambda a, c: a.relu() + -0.5, False),
    'sine': (lambda a, c: a.relu().sin(), False),
    'max-pooling of signed': (lambda a, c: F.max_pool2d(a, 3, 1, 1), False),
    'pooling of unsigned': (lambda a, c: F.avg_pool2d(F.max_pool2d(a.relu(), 2), 2), True),
    'global average': (lambda a, c: F.adaptive_avg_pool2d(a.relu(), 1), True),
    'mean': (lambda a, c: a.relu().mean((2, 3), keepdim=True), True),
    'upsampling': (lambda a, c: F.interpolate(a.relu(), scale_factor=2.0), True),
    'linear upsampling': (lambda a, c: F.interpolate(a.relu(), scale_factor=2.0, mode='bilinear'), True),
    'cubic upsampling': (lambda a, c: F.interpolate(a.relu(), scale_factor=2.0, mode='bicubic'), False),
    'shapes': (lambda a, c: a.relu().flatten(2).transpose(1, 2).permute(0, 2, 1).reshape(a.shape).contiguous(), True),
    'channel shuffle': (lambda a, c: a.relu().view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(a.shape), True),
    'chunks': (lambda a, c: torch.cat(a.relu().chunk(2, 1)[::-1], 1), True),
    'padding with 0': (lambda a, c: F.pad(a.relu(), (1, 1, 1, 1)), True),
    'padding with a negative number': (lambda a, c: F.pad(a.relu(), (1, 1, 1, 1), value=-1.0), False),
    'dropout': (lambda a, c: F.dropout(a.relu(), 0.5, training=False), True),
    'BatchNorm behind a ReLU': (lambda a, c: F.batch_norm(a.relu(), torch.ones(4), torch.ones(4)), False),
    'layer norm': (lambda a, c: F.layer_norm(a.relu(), (8,)), False),
    'ReLU of what was negated': (lambda a, c: (-a.relu()).relu(), True),
}  # fmt: skip


@pytest.mark.parametrize('name', SIGNS)
def test_signs(name: str) -> None:
    between, expected = SIGNS[name]
    model = Toy(lambda m, x: m.b(between(m.a(x), m.c(x))), a=conv(3, 4), b=conv(4, 4), c=conv(3, 4))
    assert flows_of(model)['b'].nonnegative is expected
    if expected:
        assert smallest_inputs(model, lambda number: images(4, number, (8, 8)) * 3, rounds=4)['b'] >= 0


@pytest.mark.parametrize('name', [name for name, (_, nonnegative) in SIGNS.items() if not nonnegative])
def test_no_sign_is_taken_from_what_happens_to_be_positive(name: str) -> None:
    between, _ = SIGNS[name]
    model = Toy(lambda m, x: m.b(between(m.a(x), m.c(x))), a=conv(3, 4), b=conv(4, 4), c=conv(3, 4))
    for layer in (model.a, model.c):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 0.3)
    assert not flows_of(model)['b'].nonnegative


def test_the_image_may_be_negative() -> None:
    """Pictures of noise that happen to have no negative value are no proof."""
    flows = flows_of(Toy(lambda m, x: m.a(x), a=conv(3, 4)), images(1, size=(8, 8)).abs())
    assert not flows['a'].nonnegative


# ------------------------------------------------------------------ places
def test_a_layer_called_twice_takes_in_both() -> None:
    for first in (False, True):
        for second in (False, True):
            signs = (lambda x, keep=keep: x.relu() if keep else x for keep in (first, second))
            model = Toy(lambda m, x, f=list(signs): m.b(f[1](m.b(f[0](m.a(x))))), a=conv(3, 4), b=conv(4, 4))
            flow = flows_of(model)['b']
            assert (flow.nonnegative, flow.first, flow.last) == (first and second, False, True)


def test_a_layer_that_sees_the_image_and_more() -> None:
    flows = flows_of(Toy(lambda m, x: m.b(m.a(m.a(x).relu())), a=conv(3, 3), b=conv(3, 3)))
    assert names_of(flows, 'first') == {'a'}
    flows = flows_of(Toy(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv(3, 3), b=conv(6, 3)))
    assert names_of(flows, 'first') == {'a', 'b'}


def test_a_layer_of_a_constant_does_not_see_the_image() -> None:
    model = Toy(lambda m, x: m.a(x).mean((2, 3)) + m.b(torch.ones(1, 5)), a=conv(3, 4), b=nn.Linear(5, 4))
    flows = flows_of(model)
    assert (names_of(flows, 'first'), names_of(flows, 'last')) == ({'a'}, {'a', 'b'})
    for parameter in model.b.parameters():
        parameter.requires_grad_(False)
    assert names_of(flows_of(model), 'first') == {'a'}


def test_a_part_without_gradients_is_not_taken_for_an_end() -> None:
    def forward(model: Any, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            inputs = model.b(model.a(inputs).relu()).relu()
        return model.d(model.c(inputs).relu())

    flows = flows_of(Toy(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 4)))
    assert (names_of(flows, 'first'), names_of(flows, 'last')) == ({'a'}, {'d'})
    assert names_of(flows, 'nonnegative') == {'d'}, 'nothing is known of b and c'


def test_a_relu_that_works_in_place_on_a_view() -> None:
    """A fully connected layer's output of more than two dimensions is one: mmcv's FFN does this."""
    layers = dict(a=nn.Linear(8, 6), r=nn.ReLU(inplace=True), b=nn.Linear(6, 6), c=nn.Linear(6, 2))
    flows = flows_of(Toy(lambda m, x: m.c(m.r(m.b(m.r(m.a(x))))), **layers))
    assert (names_of(flows, 'first'), names_of(flows, 'last')) == ({'a'}, {'c'})
    assert names_of(flows, 'nonnegative') == {'b', 'c'}


def test_outputs_of_several_kinds() -> None:
    layers = dict(a=conv(3, 4), b=conv(4, 2), c=conv(4, 2), d=conv(4, 2), unused=conv(4, 2))

    def forward(model: Any, inputs: Tensor) -> Any:
        features = model.a(inputs).relu()
        model.unused(features)
        return {'maps': [model.b(features).sigmoid(), (model.c(features), None)], 'size': 3, 'more': model.d(features)}

    flows = flows_of(Toy(forward, **layers))
    assert (names_of(flows, 'first'), names_of(flows, 'last')) == ({'a'}, {'b', 'c', 'd'})
