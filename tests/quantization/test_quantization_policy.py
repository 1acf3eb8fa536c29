"""The policy of a config: every mistake is named, and every layer gets what it says."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mm_sharp.quantization import LayerPolicy, QuantizationPolicy, quantize, quantized_model

LAYER = ('weight_bit_width', 'act_bit_width', 'weight_granularity', 'weight_scales', 'act_scales')
LAYER += ('weight_symmetric', 'act_symmetric', 'scale_init', 'scale_gradients')
MODEL = ('target', 'first_layers', 'last_layers', 'skip', 'layers', 'fold_batchnorm', 'input_size')
BITS = (1, 0, -4, 9, 16, 4.0, '4', None, True, [4])
ACT_BITS = tuple(17 if value == 16 else value for value in BITS)
BAD: list[tuple[str, Any]] = [
    *(('weight_bit_width', value) for value in BITS),
    *(('act_bit_width', value) for value in ACT_BITS),
    *((name, value) for name in ('first_layers', 'last_layers') for value in (*BITS, 'int8', 'Float', '')),
    *(('weight_granularity', value) for value in ('per_channel', 'Channel', None, 1, True, ['channel'])),
    *(('weight_scales', value) for value in ('stats', 'fixed', None, False)),
    *(('act_scales', value) for value in ('statistics', 'dynamic', None, 0)),
    *(('scale_gradients', value) for value in ('LSQ', None, True, 0.1)),
    *(('scale_init', value) for value in ('percentile', 'mean', None, 2.0)),
    *((name, value) for name in ('weight_symmetric', 'act_symmetric', 'fold_batchnorm') for value in (1, 'yes', None)),
    *(('skip', value) for value in ('(', '*', 3, None, {'head': 1})),
    *(('input_size', value) for value in (64, (64,), (64, 64, 3), (64.0, 64), (0, 64), (-1, 64), '6464', (True, 64))),
    *(('layers', value) for value in (None, 4, 'head', dict(pattern='head', weight_bit_width=4))),
]


def read(**policy: Any) -> QuantizationPolicy:
    return QuantizationPolicy.from_config(policy)


def bits(policy: QuantizationPolicy, name: str, first: bool = False, last: bool = False) -> Any:
    """Bits of weight and input that a layer gets, or why it gets none."""
    chosen = policy.of_layer(name, first=first, last=last)
    return chosen if isinstance(chosen, str) else (chosen.weight_bit_width, chosen.act_bit_width)


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(('name', 'value'), BAD, ids=[f'{n}={v!r}' for n, v in BAD])
def test_a_bad_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        read(**{name: value})
    message = str(caught.value)
    assert 'QuantizedModel' in message
    assert name in message
    assert repr(value) in message


@pytest.mark.parametrize('name', ['skip', 'layers'])
@pytest.mark.parametrize('value', ['(', 3, None, ['head']])
def test_of_several_patterns_the_wrong_one_is_named(name: str, value: Any) -> None:
    right, wrong = ('head', value) if name == 'skip' else (dict(pattern=p, weight_bit_width=4) for p in ('head', value))
    with pytest.raises(ValueError, match=f'policy {name}={re.escape(repr(value))} is no'):
        read(**{name: [right, wrong]})


@pytest.mark.parametrize('value', ['head', {}, dict(pattern='head'), dict(weight_bit_width=4), 4])
def test_named_layers_have_a_pattern_and_something_to_change(value: Any) -> None:
    with pytest.raises(ValueError, match=rf'policy layers={re.escape(repr(value))} .*dict\(pattern=') as caught:
        read(layers=[dict(pattern='head', weight_bit_width=4), value])
    assert 'QuantizedModel' in str(caught.value)


@pytest.mark.parametrize(('name', 'value'), [case for case in BAD if case[0] in LAYER])
def test_a_bad_value_for_some_layers_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        read(layers=[dict(pattern='head', **{name: value})])
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize('policy', [None, 4, 'w4a4', [('weight_bit_width', 4)], True])
def test_a_policy_is_a_dict(policy: Any) -> None:
    with pytest.raises(
        ValueError, match=r'policy=.* is not allowed: a dict, as policy=dict\(weight_bit_width=4'
    ) as caught:
        QuantizationPolicy.from_config(policy)
    assert repr(policy) in str(caught.value)


@given(key=st.text() | st.sampled_from(('weight_bits', 'bit_width', 'default', 'overrides', 'pattern', 'Skip')))
def test_an_unknown_key_is_named_beside_those_that_there_are(key: str) -> None:
    if key in (*LAYER, *MODEL):
        return
    with pytest.raises(ValueError) as caught:
        QuantizationPolicy.from_config({key: 4, 'weight_bit_width': 4})
    assert str([key]) in str(caught.value)
    assert all(name in str(caught.value) for name in (*LAYER, *MODEL))


@pytest.mark.parametrize('key', ['first_layers', 'skip', 'fold_batchnorm', 'bits', 3])
def test_a_key_that_only_a_whole_model_has_is_refused_for_some_layers(key: Any) -> None:
    with pytest.raises(ValueError) as caught:
        read(layers=[{'pattern': 'head', 'weight_bit_width': 4, key: 8}])
    assert f'unknown keys {[key]} in policy layers' in str(caught.value)
    assert all(name in str(caught.value) for name in LAYER)


@pytest.mark.parametrize('policy', [{}, {'layers': [dict(pattern='head', weight_scales='statistics')]}])
def test_searching_scales_in_every_step_is_refused(policy: dict[str, Any]) -> None:
    changes = {} if policy else {'weight_scales': 'statistics'}
    with pytest.raises(ValueError, match=r"'statistics' with scale_init='mse' .*: write scale_init='max'"):
        read(**policy, **changes, scale_init='mse')
    read(**policy, **changes, scale_init='max')


@pytest.mark.parametrize('values', [dict(weight_bit_width=1), dict(scale_init='mean'), dict(weight_symmetric=None)])
def test_policies_made_without_a_config_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        LayerPolicy(**values)
    with pytest.raises(ValueError, match=next(iter(values))):
        replace(LayerPolicy(), **values)


def test_the_users_dict_is_left_alone() -> None:
    layers = [dict(pattern='head', weight_bit_width=8)]
    policy = dict(weight_bit_width=4, skip=['a'], layers=layers, input_size=[64, 96])
    copy = {**policy, 'layers': [dict(item) for item in layers], 'skip': ['a'], 'input_size': [64, 96]}
    QuantizationPolicy.from_config(policy)
    assert policy == copy


# ------------------------------------------------------------------ what is allowed
def test_every_allowed_value_arrives() -> None:
    for name in LAYER[:2]:
        for width in range(2, 9):
            assert getattr(read(**{name: width}).default, name) == width
    for end in ('first_layers', 'last_layers'):
        for value in (*range(2, 9), 'same', 'float'):
            assert getattr(read(**{end: value}), end) == value
    for name, values in dict(
        weight_granularity=('channel', 'tensor'),
        weight_scales=('learned', 'statistics'),
        act_scales=('learned', 'fixed'),
        scale_init=('max', 'mse'),
        weight_symmetric=(True, False),
        act_symmetric=(True, False),
    ).items():
        for value in values:
            changes = {name: value, 'scale_init': 'max'} if name != 'scale_init' else {name: value}
            assert getattr(read(**changes).default, name) == value
    assert read(fold_batchnorm=False).fold_batchnorm is False
    assert read(input_size=[64, 96]).input_size == (64, 96)
    assert read(input_size=None).input_size is None


def test_an_empty_policy_is_eight_bits() -> None:
    policy = read()
    assert policy == QuantizationPolicy(LayerPolicy())
    assert (bits(policy, 'any'), policy.first_layers, policy.last_layers) == ((8, 8), 8, 8)
    assert {field.name for field in fields(LayerPolicy)} == set(LAYER)


# ------------------------------------------------------------------ which layer gets what
@pytest.mark.parametrize(
    ('first_layers', 'last_layers', 'expected'),
    [
        # What a layer gets in between, that sees the image, that ends the network, and that does both.
        (8, 8, ((4, 2), (8, 8), (8, 8), (8, 8))),
        (6, 5, ((4, 2), (6, 6), (5, 5), (6, 6))),
        (5, 6, ((4, 2), (5, 5), (6, 6), (6, 6))),
        ('same', 'same', ((4, 2), (4, 2), (4, 2), (4, 2))),
        ('same', 8, ((4, 2), (4, 2), (8, 8), (8, 8))),
        ('float', 8, ((4, 2), 'first layer (policy)', (8, 8), 'first layer (policy)')),
        (8, 'float', ((4, 2), (8, 8), 'last layer (policy)', 'last layer (policy)')),
        ('float', 'float', ((4, 2), 'first layer (policy)', 'last layer (policy)', 'first layer (policy)')),
        ('same', 'float', ((4, 2), (4, 2), 'last layer (policy)', 'last layer (policy)')),
    ],
)
def test_the_ends(first_layers: Any, last_layers: Any, expected: Any) -> None:
    policy = read(weight_bit_width=4, act_bit_width=2, first_layers=first_layers, last_layers=last_layers)
    ends = ((False, False), (True, False), (False, True), (True, True))
    assert tuple(bits(policy, 'x', first, last) for first, last in ends) == expected


def test_an_ends_bits_are_all_that_it_changes() -> None:
    changes = dict(weight_granularity='tensor', scale_init='max', weight_scales='statistics', act_symmetric=False)
    policy = read(weight_bit_width=4, act_bit_width=4, first_layers=6, **changes)
    assert policy.of_layer('x', first=True, last=False) == LayerPolicy(weight_bit_width=6, act_bit_width=6, **changes)


def test_layers_by_name() -> None:
    policy = read(
        weight_bit_width=4,
        act_bit_width=4,
        last_layers='float',
        layers=[
            dict(pattern='^backbone', weight_bit_width=2),
            dict(pattern='layer1', act_bit_width=8),
            dict(pattern=r'\.conv1$', weight_granularity='tensor'),
        ],
        skip=['layer4', '^neck'],
    )
    assert bits(policy, 'head.backbone') == (4, 4)
    assert bits(policy, 'backbone.layer2.0.conv2') == (2, 4)
    # The last one that matches counts, and starts from the policy, not from the others that match.
    assert bits(policy, 'backbone.layer1.0.conv2') == (4, 8)
    conv1 = policy.of_layer('backbone.layer1.0.conv1', first=False, last=False)
    assert conv1 == replace(policy.default, weight_granularity='tensor')
    # Named layers go before the ends, and what is left out before all.
    assert bits(policy, 'backbone.layer2.0.conv2', first=True, last=True) == (2, 4)
    assert bits(policy, 'other', last=True) == 'last layer (policy)'
    assert (
        bits(policy, 'backbone.layer4.0.conv1') == bits(policy, 'neck', first=True) == 'left out by the policy (skip)'
    )


def test_the_order_of_named_layers_counts() -> None:
    layers = [dict(pattern='head', weight_bit_width=2), dict(pattern='head.fc', weight_bit_width=6)]
    assert bits(read(layers=layers), 'head.fc') == (6, 8)
    assert bits(read(layers=layers[::-1]), 'head.fc') == (2, 8)


def test_one_pattern_or_several_can_be_left_out() -> None:
    for skip in ('fc', ['fc'], ('fc', 'gau')):
        assert bits(read(skip=skip), 'head.fc') == 'left out by the policy (skip)'
        assert bits(read(skip=skip), 'head.conv') == (8, 8)


def test_patterns_that_match_nothing() -> None:
    policy = read(
        skip=['fc', 'bakbone'], layers=[dict(pattern='conv', act_bit_width=4), dict(pattern='^z', act_bit_width=4)]
    )
    with pytest.raises(
        ValueError, match=r"patterns \['bakbone', '\^z'\] match no layer; there are backbone.conv1, head.fc"
    ):
        policy.check_patterns(['backbone.conv1', 'head.fc'])
    policy.check_patterns(['fc', 'zconv', 'bakbone', 'z'])
    with pytest.raises(ValueError, match=r"\['fc', 'bakbone', 'conv', '\^z'\] match no layer"):
        policy.check_patterns([])


# ------------------------------------------------------------------ in a model
class Chain(nn.Module):
    """Four layers, with a ReLU behind each but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Tensor:
        return self.head(self.body(self.stem(inputs).relu()).mean((2, 3)))


@pytest.mark.parametrize('change', [dict(skip='bakbone'), dict(layers=[dict(pattern='bakbone', act_bit_width=4)])])
def test_a_pattern_that_matches_no_layer_is_refused_and_the_model_left_alone(change: dict[str, Any]) -> None:
    model = Chain()
    with pytest.raises(ValueError, match=r"\['bakbone'\] match no layer; there are stem, body\.0, body\.2, head"):
        quantize(model, read(input_size=(9, 9), **change))
    assert [type(module) for module in model.modules()] == [type(module) for module in Chain().modules()]
    assert not hasattr(model, 'quantization')


def test_a_model_without_a_quantized_layer_is_refused() -> None:
    reason = r'no layer is quantized \(stem: left out by the policy \(skip\); body.0: left out'
    with pytest.raises(ValueError, match=reason):
        quantize(Chain(), read(input_size=(9, 9), skip='.'))


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({}, ['8,8', '4,4', '4,4', '8,8']),
        (dict(first_layers='same', last_layers=2), ['4,4', '4,4', '4,4', '2,2']),
        (dict(first_layers='float'), ['first layer (policy)', '4,4', '4,4', '8,8']),
        (dict(last_layers='float'), ['8,8', '4,4', '4,4', 'last layer (policy)']),
        (dict(skip='body.0'), ['8,8', 'left out by the policy (skip)', '4,4', '8,8']),
        (
            dict(layers=[dict(pattern='e', act_bit_width=2)], skip='stem'),
            ['left out by the policy (skip)', '4,4', '4,4', '4,2'],
        ),
        (dict(layers=[dict(pattern='stem|body.2', weight_bit_width=3)]), ['3,4', '4,4', '3,4', '8,8']),
    ],
)
def test_the_layers_of_a_model_get_what_the_policy_says(changes: dict[str, Any], expected: list[str]) -> None:
    """Read off the layers that were made, not off the record alone."""
    policy = dict(weight_bit_width=4, act_bit_width=4, input_size=(9, 9), **changes)
    model = quantized_model(Chain(), policy)
    layers = dict(model.named_modules())
    found = []
    for record in model.quantization.layers:
        layer = layers[record.name]
        if record.policy is None:
            assert type(layer) in (nn.Conv2d, nn.Linear)
            found.append(record.reason)
            continue
        width = [int(q.bit_width()) for q in (layer.weight_quant, layer.input_quant)]
        assert width == [record.policy.weight_bit_width, record.policy.act_bit_width]
        found.append('{},{}'.format(*width))
    assert found == expected


def test_the_report_names_every_layer_with_bits_or_reason() -> None:
    model = quantized_model(Chain(), dict(weight_bit_width=4, act_bit_width=6, skip='body.2', input_size=(9, 9)))
    lines = [re.sub(' +', ' ', line) for line in model.quantization.table().splitlines()]
    assert lines[1:5] == [
        'stem 108 8 8 signed',
        'body.0 144 4 6 unsigned',
        'body.2 144 float left out by the policy (skip)',
        'head 8 8 8 unsigned',
    ]
    assert lines[5].startswith('3 of 4 layers are quantized, 64.4% of their weights; 0 BatchNorms are folded')
