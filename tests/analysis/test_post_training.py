"""Sensitivity by layer and mixed precision: what is measured is what a config would build, and budgets are kept."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm_sharp.analysis.post_training.policies import read_policy
from mm_sharp.analysis.post_training.proposal import (
    budget_in_bits,
    common_target,
    config_text,
    mixed_policy,
    same_everywhere,
    weight_bits,
    with_common_skips,
)
from mm_sharp.analysis.post_training.sensitivity import MixedModel, Sensitivity, assign, measure
from mm_sharp.errors import UsageError
from mm_sharp.quantization import QuantizationPolicy, calibrate, quantize
from mm_sharp.quantization.flow import float_output
from tests.mmpose_cases import QUIET
from tests.quantized_models import Toy, conv, draw_batchnorms, images, output

pytestmark = QUIET
BATCHES = [{'inputs': images(4, seed, (8, 8))} for seed in range(2)]
SAME = dict(first_layers='same', last_layers='same', scale_init='max', input_size=(8, 8))
POLICIES: dict[str, dict[str, Any]] = {
    'low': dict(weight_bit_width=3, act_bit_width=4, **SAME),
    'high': dict(weight_bit_width=8, act_bit_width=8, **SAME),
}


def model_of(policy: dict[str, Any]) -> nn.Module:
    """A toy of three layers, one behind a BatchNorm that is folded, quantized by a policy and calibrated."""
    layers = dict(a=conv(3, 6), n=nn.BatchNorm2d(6), b=conv(6, 6, bias=False), block=nn.Sequential(conv(6, 4)))
    toy = Toy(lambda m, x: m.block(m.b(m.n(m.a(x)).relu()).relu()), **layers)
    torch.manual_seed(0)
    for layer in (toy.a, toy.b, toy.block[0]):
        layer.reset_parameters()
    model = quantize(draw_batchnorms(toy, seed=0), QuantizationPolicy.from_config(policy)).eval()
    calibrate(model, BATCHES)
    return model


def judge(model: nn.Module) -> float:
    return float(output(model, images(4, 9, (8, 8))).square().mean())


def mixed() -> MixedModel:
    return MixedModel({name: model_of(policy) for name, policy in POLICIES.items()})


@pytest.mark.slow
@pytest.mark.parametrize('others', ['float', 'low'])
def test_a_layers_sensitivity_is_that_of_a_model_built_so(others: str) -> None:
    found = measure(mixed(), ['low', 'high', 'float'], others, judge)
    assert found.others == others
    for name in ('a', 'b', 'block.0'):
        for policy in {'low', 'high', 'float'} - {others}:
            choice = {**dict.fromkeys(('a', 'b', 'block.0'), others), name: policy}
            built = model_of(mixed_policy(choice, mixed().weights, POLICIES))
            assert found.value + found.costs[name][policy] == pytest.approx(judge(built), rel=1e-6), (name, policy)
    assert all(costs[others] == 0 for costs in found.costs.values())


def test_all_layers_in_float_are_the_float_model() -> None:
    model, plain = mixed(), model_of(POLICIES['low'])
    model.choose(dict.fromkeys(model.weights, 'float'))
    inputs = images(2, 3, (8, 8))
    assert torch.allclose(output(model.model, inputs), float_output(plain, inputs))
    model.choose(dict.fromkeys(model.weights, 'low'))
    assert torch.equal(output(model.model, inputs), output(plain, inputs))
    assert model.weights == {'a': 162, 'b': 324, 'block.0': 216}


def test_layers_that_a_policy_skips_are_float_for_all() -> None:
    models = {'low': model_of(POLICIES['low']), 'high': model_of({**POLICIES['high'], 'skip': ['^b$']})}
    expected = model_of({**POLICIES['low'], 'skip': ['^b$']})
    model = MixedModel(models)
    assert list(model.weights) == ['a', 'block.0']
    assert judge(model.model) == pytest.approx(judge(expected), rel=1e-6)


def test_the_most_sensitive_layer_comes_first() -> None:
    alone, spared = (measure(mixed(), ['low', 'float'], others, judge) for others in ('float', 'low'))
    worst = max(alone.costs, key=lambda name: alone.costs[name]['low'])
    assert alone.ranked()[0] == worst
    assert spared.ranked()[0] == min(spared.costs, key=lambda name: spared.costs[name]['float'])


@pytest.mark.parametrize(('others', 'first'), [('float', 'b'), ('low', 'c')])
def test_layers_whose_costs_all_have_one_sign_are_in_order(others: str, first: str) -> None:
    sign = -1 if others == 'float' else 1
    worst = {'a': 2.0, 'b': 1.0, 'c': 3.0} if others == 'float' else {'a': 2.0, 'b': 3.0, 'c': 1.0}
    costs = {name: {others: 0.0, 'high': sign * cost} for name, cost in worst.items()}
    assert Sensitivity(others, 1.0, costs).ranked() == [first, 'a', 'c' if first == 'b' else 'b']


# ------------------------------------------------------------------ budgets
WEIGHTS = {'a': 100, 'b': 300, 'c': 200, 'd': 50}
BITS = {'w2': 2, 'w4': 4, 'w8': 8}
COSTS = {
    'a': {'w2': 5.0, 'w4': 1.0, 'w8': 0.1},
    'b': {'w2': 2.0, 'w4': 1.5, 'w8': 0.0},
    'c': {'w2': 0.3, 'w4': 0.2, 'w8': 0.1},
    'd': {'w2': 9.0, 'w4': 0.5, 'w8': 0.6},  # noise: fewer bits can look better
}


def bits_of(choice: dict[str, str]) -> int:
    return sum(WEIGHTS[name] * BITS[policy] for name, policy in choice.items())


def cost_of(choice: dict[str, str]) -> float:
    return sum(COSTS[name][policy] for name, policy in choice.items())


@pytest.mark.parametrize('mean', [2, 2.5, 3, 4, 5, 6, 7, 8])
def test_a_budget_is_kept_at_nearly_the_least_cost(mean: float) -> None:
    budget = mean * sum(WEIGHTS.values())
    choice = assign(WEIGHTS, COSTS, BITS, budget)
    every = [dict(zip(WEIGHTS, policies, strict=True)) for policies in product(BITS, repeat=4)]
    best = min(cost_of(other) for other in every if bits_of(other) <= budget)
    assert bits_of(choice) <= budget
    assert cost_of(choice) <= best + 1.5, 'a single step of a single layer off'
    assert assign(WEIGHTS, COSTS, BITS, 8 * 650)['d'] == 'w4'


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r'budget=1299: with the fewest bits the weights take 1300 bits'):
        assign(WEIGHTS, COSTS, BITS, 1299)


@pytest.mark.parametrize(
    ('names', 'budget', 'message'),
    [
        (
            ['low', 'high'],
            dict(mean_bits=2.0),
            r'--mean-bits 2: with the fewest bits \(low\) the weights have 3\.0 bits on average: '
            r'write --mean-bits 3\.0 or more, or give --policy with fewer bits, such as w2a4$',
        ),
        (['high'], dict(mean_bits=7.9), r'--mean-bits 7\.9: .*\(high\).* 8\.0 bits on average'),
        (['float', 'lowest'], dict(mean_bits=1.0), r'--mean-bits 1: .*write --mean-bits 2\.0 or more$'),
        (
            ['low', 'high'],
            dict(size_mb=1e-4),
            r'--size-mb 0\.0001: .*\(low\) the model takes 0\.001 MB: write --size-mb',
        ),
    ],
)
def test_a_budget_that_no_policy_keeps_to_is_refused_in_its_unit(
    names: list[str], budget: dict[str, float], message: str
) -> None:
    policies = {**POLICIES, 'lowest': {**POLICIES['low'], 'weight_bit_width': 2}}
    weights = {'a': 162, 'b': 324, 'block.0': 216}
    with pytest.raises(UsageError, match=message) as caught:
        budget_in_bits(weights, 700, policies, names, **budget)
    (named,) = re.findall(r'write --(\S+) ([\d.]+)', str(caught.value))
    assert budget_in_bits(weights, 700, policies, names, **{named[0].replace('-', '_'): float(named[1])}) > 0


def test_policies_have_one_target_at_most() -> None:
    generic, runtime = {}, {'target': 'onnxruntime'}
    assert common_target([generic, {'target': 'generic'}]) == 'generic'
    assert common_target([generic, runtime, runtime]) == 'onnxruntime'
    with pytest.raises(UsageError, match=r'^--policy: a model has one target, and these say onnxruntime and openvino'):
        common_target([{'target': 'openvino'}, generic, runtime])


def test_the_proposed_policy_is_a_config_and_gives_each_layer_its_bits(tmp_path: Path) -> None:
    policies = {'w4a4': same_everywhere(read_policy('w4a4')), 'w8a8': same_everywhere(read_policy('w8a8'))}
    policies = {name: {**policy, 'input_size': (8, 8)} for name, policy in policies.items()}
    choice = {'a': 'w8a8', 'b': 'w4a4', 'block.0': 'float'}
    policy = mixed_policy(choice, mixed().weights, policies)
    file = tmp_path / 'mixed.py'
    file.write_text(config_text(policy, 'Proposed.\nFor a test.'))
    assert file.read_text().startswith('# Proposed.\n# For a test.\nsharp_quantization = dict(\n    policy=dict(\n')
    read = read_policy(str(file))
    assert read == policy
    model = model_of(read)
    layers = {layer.name: layer.policy for layer in model.quantization.layers}
    for name, chosen in (('a', 'w8a8'), ('b', 'w4a4')):
        expected = QuantizationPolicy.from_config(policies[chosen]).default
        assert layers[name] == expected
    assert layers['block.0'] is None
    assert weight_bits(policies) == {'w4a4': 4, 'w8a8': 8, 'float': 32}
    assert deepcopy(policies['w4a4']) == {**same_everywhere(read_policy('w4a4')), 'input_size': (8, 8)}


def test_what_one_policy_skips_stays_float_whichever_the_others_are() -> None:
    low, high = (same_everywhere(read_policy(name)) for name in ('w4a4', 'w8a8'))
    policies = with_common_skips({'low': {**low, 'input_size': (8, 8)}, 'high': {**high, 'skip': '^b$'}})
    policy = mixed_policy({'a': 'low', 'block.0': 'low'}, mixed().weights, policies)
    assert [layer.name for layer in model_of(policy).quantization.layers if layer.policy is None] == ['b']
    assert with_common_skips({'low': low, 'high': high}) == {'low': low, 'high': high}


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('w4a5', r"^--policy w4a5: no such policy; did you mean 'w4a"),
        ('missing.py', r'^--policy missing\.py: no such file in .*; tools/sensitivity\.py writes'),
        ('empty.py', r"^--policy .*empty\.py: '.*' has no sharp_quantization = dict\(policy=dict"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'empty.py').write_text('sharp_quantization = dict()\n')
    with pytest.raises(UsageError, match=message):
        read_policy(str(tmp_path / name) if name == 'empty.py' else name)
