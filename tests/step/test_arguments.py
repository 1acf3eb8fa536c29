"""Every constructor argument is validated; the error names it, its value and what is allowed."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from torch import nn
from torch.optim import SGD

from mm_sharp import SAMOptimWrapper, SharpnessHook
from mm_sharp.ops.parameters import ParameterSelector, is_norm_layer
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.toys import make
from tests.wrappers import WRAPPERS, build

BAD: list[tuple[str, Any]] = [
    *(('rho', value) for value in (-0.1, math.nan, math.inf, '0.05', None, True, [0.1], 10**400)),
    *(('eta', value) for value in (-1e-9, math.inf, 'small')),
    *(('eps', value) for value in (0.0, -1e-12, math.nan, None)),
    *((name, value) for name in ('perturb_quantized', 'sync_perturbation', 'replay_rng') for value in (1, 'yes', None)),
    *(('adaptive', value) for value in (1, 0, 'yes', 'Tensor', None)),
    *(('dtype', value) for value in ('fp16', 'float32', torch.float32, 16, 'amp')),
    *(('loss_scale', value) for value in ('static', 0, -1.0, True, None, 1e-40, math.inf, 10**400)),
    *(('loss_scale', {key: value}) for key, value in (('scale', 2.0), ('growth_factor', 1), ('backoff_factor', 1))),
    *(('loss_scale', {key: value}) for key, value in (('init_scale', '1'), ('growth_interval', 1.5), ('enabled', 1))),
    *(('accumulative_counts', value) for value in (0, -1, 1.5, '2', True, 10**30)),
    *(('clip_grad', value) for value in ({}, dict(type='norm'), 1.0, dict(type='cube', max_norm=1), dict(max_nrm=1))),
    *(('clip_grad', dict(max_norm=value)) for value in (0, -1, '1', math.nan, True, 1e39)),
    *(('clip_grad', dict(max_norm=1, **{key: 'x'})) for key in ('norm_type', 'foreach', 'error_if_nonfinite')),
    *(('clip_grad', value) for value in (dict(clip_value=1), dict(type='value', max_norm=1))),
    *(('perturb', value) for value in ('none', 3, None, ['conv'], dict(norms=False), dict(norm='no'))),
    *(('perturb', value) for value in (dict(include=3), dict(exclude=['(']), dict(include=['a', 2]))),
]


@pytest.mark.parametrize(('argument', 'value'), BAD, ids=[f'{n}={v!r}' for n, v in BAD])
def test_a_bad_value_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        build('sam', make(), **{argument: value})
    message = str(caught.value)
    assert 'SAMOptimWrapper' in message
    assert argument in message
    assert repr(value) in message
    assert 'rite' in message, 'no corrected form is shown'


@pytest.mark.parametrize('name', WRAPPERS)
def test_the_message_names_the_wrapper(name: str) -> None:
    with pytest.raises(ValueError, match=rf'{WRAPPERS[name][0].__name__}.*rho=-0\.1'):
        build(name, make(), rho=-0.1)


@given(rho=st.floats(0, 10), eta=st.floats(0, 1), eps=st.floats(1e-16, 1e-3))
def test_every_value_in_range_is_accepted(rho: float, eta: float, eps: float) -> None:
    wrapper = build('sam', make(), rho=rho, eta=eta, eps=eps)
    assert (wrapper.rho, wrapper.settings.eta, wrapper.settings.eps) == (rho, eta, eps)


@pytest.mark.parametrize('perturb', [dict(norm=False, bias=False), 'all', 'auto', dict(include='conv')])
def test_integers_and_config_forms_are_accepted(perturb: Any) -> None:
    assert build('sam', make(), rho=1, perturb=perturb).rho == 1.0


@pytest.mark.parametrize('key', ['include', 'exclude'])
def test_a_pattern_that_matches_nothing_is_refused_at_the_first_step(key: str) -> None:
    model = make()
    selector = ParameterSelector('SAMOptimWrapper', {key: 'bakbone'})
    with pytest.raises(ValueError, match=f"{key} pattern 'bakbone' matches no parameter"):
        selector.select(model, list(model.parameters()))


def test_perturbing_nothing_is_refused() -> None:
    model = make()
    selector = ParameterSelector('SAMOptimWrapper', dict(exclude='.'))
    with pytest.raises(ValueError, match='leaves no parameter'):
        selector.select(model, list(model.parameters()))


def test_quantizer_scales_are_told_by_their_name() -> None:
    model = nn.Module()
    model.weight_quant = nn.Module()
    model.weight_quant.tensor_quant = nn.Module()
    model.weight_quant.tensor_quant.value = nn.Parameter(torch.ones(1))
    model.weight = nn.Parameter(torch.ones(1))
    selector = ParameterSelector('SAMOptimWrapper', dict(quantizer_scale=False))
    assert selector.select(model, list(model.parameters())) == [model.weight]


@pytest.mark.parametrize(
    ('perturb', 'left_out'),
    [
        ('auto', {'conv.bias', 'norm.bias', 'conv.weight_quant.tensor_quant.value'}),
        ('all', set()),
        ('weights', {'conv.bias', 'norm.weight', 'norm.bias', 'conv.weight_quant.tensor_quant.value'}),
    ],
)
def test_what_is_perturbed_in_a_quantized_model(perturb: str, left_out: set[str]) -> None:
    model = nn.ModuleDict({'conv': nn.Conv2d(1, 2, 1), 'norm': nn.BatchNorm2d(2)})
    names = {parameter: name for name, parameter in model.named_parameters()}
    selector = ParameterSelector('SAMOptimWrapper', perturb)
    if perturb != 'weights':
        assert selector.select(model, list(names)) == list(names), 'without quantizers everything is'
    model.conv.weight_quant = nn.ModuleDict({'tensor_quant': nn.ParameterDict({'value': nn.Parameter(torch.ones(1))})})
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in selector.select(model, list(names))} == set(names.values()) - left_out


@pytest.mark.parametrize('perturb', ['weights', dict(bias=False)])
def test_biases_of_torchs_layers(perturb: Any) -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    model = nn.ModuleDict({'lstm': nn.LSTM(2, 2, bidirectional=True), 'cell': nn.GRUCell(2, 2), 'attention': attention})
    names = {parameter: name for name, parameter in model.named_parameters()}
    selected = ParameterSelector('SAMOptimWrapper', perturb).select(model, list(names))
    assert {names[parameter] for parameter in selected} == {name for name in names.values() if 'bias' not in name}
    assert any(name.endswith('bias_hh_l0_reverse') for name in names.values())


def test_auto_is_the_default() -> None:
    assert signature(TwoPassOptimWrapper).parameters['perturb'].default == 'auto'


class LayerNorm2d(nn.Module):
    """Named as OpenMMLab names its own."""


@pytest.mark.parametrize(
    ('layer', 'expected'),
    [
        (nn.BatchNorm1d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.LayerNorm(2), True),
        (nn.InstanceNorm2d(2), True),
        (LayerNorm2d(), True),
        (nn.Linear(1, 1), False),
        (nn.Sequential(nn.BatchNorm1d(2)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norm_layers(layer: nn.Module, expected: bool) -> None:
    assert is_norm_layer(layer) is expected


def test_registered_in_the_root_registries() -> None:
    assert OPTIM_WRAPPERS.get('SAMOptimWrapper') is SAMOptimWrapper
    assert HOOKS.get('SharpnessHook') is SharpnessHook
    model = make()
    config = dict(type='SAMOptimWrapper', rho=0.1, optimizer=SGD(model.parameters(), lr=0.1))
    assert OPTIM_WRAPPERS.build(config).rho == 0.1


@pytest.mark.parametrize('interval', [0, -5, 2.0, '10', True])
def test_a_bad_hook_interval_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match=r'SharpnessHook: interval=.*at least 1'):
        SharpnessHook(interval=interval)


def test_sparse_gradients_are_refused() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.table(rows).square().mean()

    model = Embedding()
    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        loss = model(torch.tensor([1, 2]))
    with pytest.raises(NotImplementedError, match=r"\['table.weight'\] are sparse"):
        wrapper.update_params(loss)
