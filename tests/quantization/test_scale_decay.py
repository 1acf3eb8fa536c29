"""No quantizer scale decays, whatever built the optimizer; all else of its groups stays, and old runs resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner
from mmpose.engine.optim_wrappers import LayerDecayOptimWrapperConstructor
from torch import nn

from mm_sharp.quantization import scale_decay
from tests.mmpose_cases import QUIET
from tests.quantized_toys import policy, quantized
from tests.toys import make, same_bits, same_state, toy_config

pytestmark = QUIET
SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)
ADAMW = dict(type='AdamW', lr=0.01, weight_decay=0.1)
DEFAULT_DECAY = dict(type='AdamW', lr=0.01)
LAYERS = dict(constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(num_layers=3, layer_decay_rate=0.5))
_numbers = itertools.count()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoOptimizers:
    """A constructor that is none of MMEngine's: one optimizer for the convolutions, one for the rest."""

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: Any = None) -> None:
        self.lr = optim_wrapper_cfg['optimizer']['lr']

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            split['conv' in name].append(parameter)
        kinds = (torch.optim.SGD, torch.optim.AdamW)
        built = [kind(split[i], lr=self.lr, weight_decay=0.2) for i, kind in zip((True, False), kinds, strict=True)]
        return OptimWrapperDict(**{name: OptimWrapper(one) for name, one in zip('ab', built, strict=True)})


CONFIGS: dict[str, dict[str, Any]] = {
    'one group': dict(optimizer=SGD),
    "the optimizer's own decay": dict(optimizer=DEFAULT_DECAY),
    'no learning rate': dict(optimizer=dict(type='AdamW')),
    'a rate for the scales': dict(optimizer=ADAMW, paramwise_cfg=dict(custom_keys={'tensor_quant': dict(lr_mult=0.1)})),
    'a rule for a part of the model': dict(
        optimizer=SGD, paramwise_cfg=dict(custom_keys={'branch': dict(decay_mult=2.0)})
    ),
    'layer decay': dict(optimizer=ADAMW, **LAYERS),
    'layer decay, SAM': dict(type='SAMOptimWrapper', rho=0.05, optimizer=SGD, **LAYERS),
    'two optimizers': dict(constructor='TwoOptimizers', optimizer=SGD),
}


def options_of(wrapper: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """By a parameter's name, the options of its group; every parameter is in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    groups = [group for member in wrappers for group in member.optimizer.param_groups]
    for group in groups:
        assert group.get('param_names') in (None, [names[id(p)] for p in group['params']])
    pairs = [(names[id(p)], group) for group in groups for p in group['params']]
    assert sorted(name for name, _ in pairs) == sorted(names.values())
    return {name: {k: v for k, v in group.items() if k not in ('params', 'param_names')} for name, group in pairs}


def decaying_scales(wrapper: Any, model: nn.Module) -> list[str]:
    options = options_of(wrapper, model)
    return [name for name in options if 'tensor_quant' in name and options[name]['weight_decay']]


def as_before(model: nn.Module, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the constructor alone makes."""
    with monkeypatch.context() as patch:
        patch.setattr(scale_decay, 'keep_scales_from_decay', lambda *args: None)
        return build_optim_wrapper(model, config)


@pytest.mark.parametrize('name', CONFIGS)
def test_no_scale_decays_and_all_else_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = quantized(), {'type': 'OptimWrapper', **CONFIGS[name]}
    before = options_of(as_before(model, config, monkeypatch), model)
    assert any(before[parameter]['weight_decay'] for parameter in before if 'tensor_quant' in parameter)
    wrapper = build_optim_wrapper(model, config)
    found = options_of(wrapper, model)
    assert not decaying_scales(wrapper, model)
    for parameter, options in found.items():
        decay = 0.0 if 'tensor_quant' in parameter else before[parameter]['weight_decay']
        assert options == {**before[parameter], 'weight_decay': decay}, parameter


@pytest.mark.parametrize('config', [CONFIGS['one group'], CONFIGS['layer decay']])
def test_decay_moves_weights_alone(config: dict[str, Any]) -> None:
    model = quantized()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapper = build_optim_wrapper(model, {'type': 'OptimWrapper', **config})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapper.step()
    for name, parameter in model.named_parameters():
        if 'tensor_quant' in name:
            assert same_bits(parameter.detach(), start[name]), name
    assert not same_bits(model.conv.weight.detach(), start['conv.weight'])


def test_what_a_config_says_itself_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = dict(custom_keys={'tensor_quant': dict(decay_mult=0.5)})
    model, config = quantized(), dict(type='OptimWrapper', optimizer=SGD, paramwise_cfg=rule)
    wrapper = build_optim_wrapper(model, config)
    assert options_of(wrapper, model) == options_of(as_before(model, config, monkeypatch), model)
    assert len(decaying_scales(wrapper, model)) == len([n for n, _ in model.named_parameters() if 'tensor_quant' in n])


@pytest.mark.parametrize('config', [dict(optimizer=SGD), dict(optimizer=SGD, **LAYERS)])
def test_float_models_are_trained_as_without_us(config: dict[str, Any]) -> None:
    model, config = make(), {'type': 'OptimWrapper', **config}
    constructors = {None: DefaultOptimWrapperConstructor, LAYERS['constructor']: LayerDecayOptimWrapperConstructor}
    kind = constructors[config.get('constructor')]
    expected = kind(dict(type='OptimWrapper', optimizer=SGD), config.get('paramwise_cfg'))(model)
    found = build_optim_wrapper(model, config).optimizer.state_dict()
    assert found == expected.optimizer.state_dict()


# ------------------------------------------------------------------ checkpoints
def run(folder: Path, **changes: Any) -> Runner:
    """Runs of a quantized toy; a schedule that changes the learning rate in every iteration."""
    config = toy_config(folder / f'run{next(_numbers)}', model=dict(type='QuantizedModel', model='ResidualToy'))
    config['model']['policy'] = policy()
    config['train_dataloader']['dataset'] = dict(type='ResidualSamples', count=20)
    config['optim_wrapper'] = {'type': 'OptimWrapper', **CONFIGS['layer decay']}
    config['param_scheduler'] = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10)]
    config['custom_hooks'] = [dict(type='CalibrationHook', num_batches=2)]
    runner = Runner.from_cfg({**config, **changes})
    runner.train()
    return runner


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    whole = run(tmp_path)
    half = str(Path(whole.work_dir) / 'epoch_1.pth')
    resumed = run(tmp_path, load_from=half, resume=True)
    assert resumed.iter == whole.iter == 10
    assert same_state(resumed.model, whole.model)
    assert not decaying_scales(resumed.optim_wrapper, resumed.model)


def test_a_run_from_before_resumes_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scales go on decaying, with its schedule: exactly as if it had never stopped."""
    with monkeypatch.context() as patch:
        patch.setattr(scale_decay, 'keep_scales_from_decay', lambda *args: None)
        whole = run(tmp_path)
    half = str(Path(whole.work_dir) / 'epoch_1.pth')
    resumed = run(tmp_path, load_from=half, resume=True)
    assert same_state(resumed.model, whole.model)
    assert len(resumed.optim_wrapper.optimizer.param_groups) == len(whole.optim_wrapper.optimizer.param_groups)
    assert decaying_scales(resumed.optim_wrapper, resumed.model)
    new = run(tmp_path)
    assert not same_state(new.model, whole.model)


def test_an_optimizer_loads_what_it_saved_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter gets its own momentum, in the groups of both kinds."""
    model, config = quantized(), {'type': 'OptimWrapper', 'optimizer': SGD}
    for old in (False, True):
        source = as_before(model, config, monkeypatch) if old else build_optim_wrapper(model, config)
        for number, parameter in enumerate(model.parameters()):
            source.optimizer.state[parameter]['momentum_buffer'] = torch.full_like(parameter, number)
        target = build_optim_wrapper(model, config)
        assert len(target.optimizer.param_groups) == 2
        target.load_state_dict(source.state_dict())
        assert len(target.optimizer.param_groups) == (1 if old else 2)
        for number, parameter in enumerate(model.parameters()):
            assert bool((target.optimizer.state[parameter]['momentum_buffer'] == number).all())
