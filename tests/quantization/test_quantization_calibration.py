"""Calibration: what it sets, what it leaves, and the hook that does it in a Runner."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from mm_sharp.quantization import (
    calibrate,
    check_calibrated,
    is_calibrated,
    quantized_model,
)
from tests.mmpose_cases import QUIET
from tests.quantized_models import (
    RTMPOSE,
    Toy,
    calibrated,
    conv,
    draw_batchnorms,
    images,
    output,
    policy,
    quantized,
)
from tests.quantized_toys import plain_state
from tests.toys import same_bits, same_state

pytestmark = QUIET
BATCHES = [{'inputs': images(4, seed, (8, 8))} for seed in range(4)]


def toy(**changes: Any) -> nn.Module:
    """A BatchNorm that is folded, one that is not, and a layer without a bias."""
    layers = dict(a=conv(3, 6), n=nn.BatchNorm2d(6), b=conv(6, 6, bias=False), o=nn.BatchNorm2d(6), c=conv(6, 4))
    model = Toy(lambda m, x: m.c(m.o(m.b(m.n(m.a(x)).relu()).relu())), **layers)
    torch.manual_seed(0)
    for layer in (model.a, model.b, model.c):
        layer.reset_parameters()
    return quantized_model(draw_batchnorms(model, seed=0), {**policy(), 'input_size': (8, 8), **changes})


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if 'tensor_quant' in name}


# ------------------------------------------------------------------ before
@pytest.mark.parametrize('training', [True, False])
def test_a_model_that_is_not_calibrated_refuses_to_run(training: bool) -> None:
    model = toy().train(training)
    state = deepcopy(plain_state(model))
    with pytest.raises(RuntimeError, match=r'6 quantizers have no scale yet \(the first is a\.input_quant.* calibrate'):
        model(images(1, 0, (8, 8)))
    with pytest.raises(RuntimeError, match='has not been calibrated'):
        check_calibrated(model)
    assert plain_state(model) == state
    assert not is_calibrated(model)


def test_every_way_into_a_model_of_mmpose_is_guarded() -> None:
    model = quantized(RTMPOSE)
    batch = RTMPOSE.batch(RTMPOSE.config())
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
    for way in (model.val_step, model.test_step, lambda data: model.train_step(data, wrapper)):
        with pytest.raises(RuntimeError, match='has not been calibrated'):
            way(deepcopy(batch))


def test_float_models_are_told_apart() -> None:
    for refuse in (check_calibrated, lambda model: calibrate(model, BATCHES)):
        with pytest.raises(
            TypeError, match=r"model=Linear is a float model: .* or build it with type='QuantizedModel'"
        ):
            refuse(nn.Linear(2, 2))
    assert not is_calibrated(nn.Linear(2, 2))


# ------------------------------------------------------------------ what it sets
def test_every_quantizer_has_a_value_afterwards() -> None:
    for changes in ({}, dict(act_symmetric=False, weight_symmetric=False, scale_init='mse'), dict(act_scales='fixed')):
        model = toy(**changes)
        assert scales_of(model) == {}
        calibrate(model, BATCHES)
        check_calibrated(model)
        parameters = {name: p for name, p in model.named_parameters() if 'tensor_quant' in name}
        assert scales_of(model).keys() == parameters.keys()
        assert all(bool(p.isfinite().all()) for p in parameters.values())
        assert all(bool((p > 0).all()) for name, p in parameters.items() if 'scaling' in name)


def test_it_is_deterministic_and_draws_no_random_number() -> None:
    first, second = toy(), toy()
    state = torch.get_rng_state()
    calibrate(first, BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    calibrate(second, iter(BATCHES))
    assert same_state(first, second)
    third = toy()
    calibrate(third, BATCHES[:1])
    assert not same_state(first, third)


def test_the_order_of_the_batches_does_not_count() -> None:
    first, second = toy(), toy()
    calibrate(first, BATCHES)
    calibrate(second, BATCHES[::-1])
    for name, value in scales_of(first).items():
        assert torch.allclose(value, scales_of(second)[name], rtol=1e-5)


@pytest.mark.slow
def test_calibrating_again_starts_anew() -> None:
    for changes in ({}, dict(act_symmetric=False, weight_symmetric=False, scale_init='mse')):
        model, expected = toy(**changes), toy(**changes)
        calibrate(model, [{'inputs': 100 * batch['inputs'] + 7} for batch in BATCHES])
        calibrate(model, BATCHES)
        calibrate(expected, BATCHES)
        assert same_state(model, expected)
        inputs = images(2, 9, (8, 8))
        assert torch.equal(output(model, inputs), output(expected, inputs))


@pytest.mark.slow
@pytest.mark.parametrize('changes', [{}, dict(act_symmetric=False, weight_symmetric=False)], ids=str)
def test_the_copy_of_a_model_that_was_not_calibrated_can_be(changes: dict[str, Any]) -> None:
    """Searching scales of least squared error, Brevitas switches modes in the model that it built."""
    model = toy(scale_init='mse', **changes)
    copy, expected = deepcopy(model), toy(scale_init='mse', **changes)
    before = plain_state(model)
    calibrate(copy, BATCHES)
    assert plain_state(model) == before
    calibrate(model, BATCHES)
    calibrate(expected, BATCHES)
    assert same_state(copy, expected)
    assert same_state(model, expected)


# ------------------------------------------------------------------ what it leaves
def test_nothing_but_scales_is_changed() -> None:
    model = toy(fold_batchnorm=False).train()
    model.n.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    objects = list(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, BATCHES)
    after = model.state_dict()
    assert all(same_bits(value, after[name]) for name, value in before.items())
    assert all('tensor_quant' in name for name in after.keys() - before.keys())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(left is right for left, right in zip(objects, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.quantization.calibrating


@pytest.mark.slow
@pytest.mark.parametrize('init', ['max', 'mse'])
def test_forward_passes_change_nothing_but_batchnorm(init: str) -> None:
    """Buffers, counters and flags of every module: a second pass of a sharpness-aware step finds nothing to move."""
    model = calibrated(RTMPOSE, fold_batchnorm=False) if init == 'max' else toy(fold_batchnorm=False, scale_init=init)
    if init == 'mse':
        calibrate(model, BATCHES)
    size = (64, 64) if init == 'max' else (8, 8)
    arguments = (images(2, 3, size), None, 'tensor')
    model.eval()
    model(*arguments)
    before = plain_state(model)
    model(*arguments)
    assert plain_state(model) == before
    model.train()
    before = plain_state(model)
    for _ in range(2):
        outputs = model(*arguments)
        sum(value.square().sum() for value in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    after = plain_state(model)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed
    assert {name.rpartition('.')[2] for name in changed} == {'running_mean', 'running_var', 'num_batches_tracked'}
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(*arguments)
    assert all(same_bits(value, parameters[name]) for name, value in model.named_parameters())


# ------------------------------------------------------------------ what goes wrong
def fails() -> Iterator[dict[str, Tensor]]:
    yield BATCHES[0]
    raise OSError('no such picture')


@pytest.mark.parametrize('changes', [{}, dict(weight_scales='statistics'), dict(act_symmetric=False)])
@pytest.mark.parametrize(
    ('batches', 'error', 'message'),
    [([], ValueError, 'at least one batch'), (fails, OSError, 'no such picture'), ([{}], KeyError, 'inputs')],
)
def test_a_calibration_that_fails_leaves_no_scales(
    batches: Any, error: type[Exception], message: str, changes: dict[str, Any]
) -> None:
    """Brevitas would give inputs of which it has seen nothing a scale of 1, and never look at them again."""
    model = toy(**changes).train()
    with pytest.raises(error, match=message):
        calibrate(model, batches() if callable(batches) else batches)
    assert not is_calibrated(model)
    assert model.training
    with pytest.raises(RuntimeError, match='has not been calibrated'):
        model(images(1, 0, (8, 8)))
    expected = toy(**changes)
    for each in (model, expected):
        calibrate(each, BATCHES)
    assert same_state(model, expected)


@pytest.mark.parametrize('name', ['a.weight', 'b.weight', 'c.bias'])
def test_weights_that_are_not_finite_are_found(name: str) -> None:
    model = toy()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = float('nan')
    if name == 'c.bias':  # behind all quantizers
        calibrate(model, BATCHES)
        return
    with pytest.raises(ValueError, match=r'calibration: .*tensor_quant.* is not finite'):
        calibrate(model, BATCHES)
    assert not is_calibrated(model)


# ------------------------------------------------------------------ bias correction
def mean_errors(model: nn.Module, source: nn.Module, names: str) -> Tensor:
    """Each layer's mean error in each channel, on what it takes in in the float model."""
    found: list[Tensor] = []
    taken: dict[str, list[Tensor]] = {}
    handles = [
        getattr(source, name).register_forward_pre_hook(
            lambda _, args, name=name: taken.setdefault(name, []).append(args[0])
        )
        for name in names
    ]
    for batch in BATCHES:
        output(source, batch['inputs'])
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for name in names:
            inputs = torch.cat(taken[name])
            error = getattr(model, name)(inputs) - getattr(source, name)(inputs)
            found.append(error.mean((0, 2, 3)).abs())
    return torch.cat(found)


def folded_float(**changes: Any) -> nn.Module:
    """The float model behind :func:`toy`: its layers with quantizers that hand on what they get."""
    model = toy(**changes)
    for module in model.modules():
        if hasattr(module, 'disable_quant'):
            module.disable_quant = True
    model.quantization.calibrated = True
    return model


def test_bias_correction_takes_the_mean_error_away() -> None:
    bits = dict(weight_bit_width=3, act_bit_width=3, first_layers='same', last_layers='same')
    plain, corrected, source = toy(**bits), toy(**bits), folded_float(**bits)
    calibrate(plain, BATCHES)
    calibrate(corrected, BATCHES, bias_correction=True)
    before, after = (mean_errors(model, source, 'ac') for model in (plain, corrected))
    assert float(before.max()) > 0.01
    assert float(after.max()) < 1e-5


def test_bias_correction_changes_biases_alone_and_makes_none() -> None:
    plain, corrected = toy(), toy()
    calibrate(plain, BATCHES)
    calibrate(corrected, BATCHES, bias_correction=True)
    assert corrected.b.bias is None
    states = plain.state_dict(), corrected.state_dict()
    assert states[0].keys() == states[1].keys()
    changed = {name for name in states[0] if not same_bits(states[0][name], states[1][name])}
    assert changed == {'a.bias', 'c.bias'}
    check_calibrated(corrected)
    assert not any(module._forward_hooks for module in corrected.modules())
    assert torch.equal(output(corrected, BATCHES[0]['inputs']), output(deepcopy(corrected), BATCHES[0]['inputs']))
