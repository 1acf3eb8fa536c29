"""Checkpoints into quantized models: a float model's, a quantized one's, and those that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict
from torch import nn

from mm_sharp.quantization import CheckpointMismatchError, calibrate, is_calibrated, quantized_model
from mm_sharp.quantization.record import LAYOUT
from tests.checkpoints import through_disk
from tests.mmpose_cases import QUIET, Case
from tests.quantized_models import (
    DECONV,
    EVERY,
    RLE,
    Toy,
    calibrated,
    conv,
    distance,
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
Load = Callable[[nn.Module, dict[str, Any]], Any]


@pytest.fixture
def load_file(tmp_path: Path) -> Load:
    """Load a state as a Runner does for ``load_from`` and ``resume``: through a file, in MMEngine's way."""

    def by_mmengine(model: nn.Module, state: dict[str, Any]) -> None:
        torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'checkpoint.pth')
        load_checkpoint(model, str(tmp_path / 'checkpoint.pth'), map_location='cpu', strict=False)

    return by_mmengine


@pytest.fixture(params=['torch', 'mmengine'])
def load(request: pytest.FixtureRequest, load_file: Load) -> Load:
    """Load a state in torch's way and in MMEngine's."""
    return load_file if request.param == 'mmengine' else lambda model, state: model.load_state_dict(state, strict=False)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = found.append  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def toy(**changes: Any) -> nn.Module:
    """Four layers and a BatchNorm, quantized."""
    layers = dict(a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 2))
    model = Toy(lambda m, x: m.d(m.c(m.b(m.n(m.a(x)).relu()).relu()).relu()), **layers)
    return quantized_model(draw_batchnorms(model, seed=0), {**policy(), 'input_size': (8, 8), **changes})


BATCHES = [{'inputs': images(4, 0, (8, 8))}]


def calibrated_toy(**changes: Any) -> nn.Module:
    model = toy(**changes)
    calibrate(model, BATCHES)
    return model


# ------------------------------------------------------------------ a float model's
@EVERY
def test_of_a_float_checkpoint_only_what_belongs_to_quantizers_is_missing(case: Case) -> None:
    source = float_model(case, seed=1).state_dict()
    model = quantized(case, fold_batchnorm=False)
    result = model.load_state_dict(source)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    state = model.state_dict()
    assert set(state) == {*source, LAYOUT}, 'quantizers have no values yet'
    assert all(torch.equal(state[name], value) for name, value in source.items())
    assert not is_calibrated(model)
    calibrate(model, samples(1))
    assert all('tensor_quant' in name for name in model.state_dict().keys() - state.keys())


@EVERY
def test_a_float_checkpoint_is_folded_into_the_quantized_model(case: Case, load_file: Load) -> None:
    """Equal to the float model, when quantizers hand on what they get."""
    source, model = float_model(case, seed=1), quantized(case)
    load_file(model, source.state_dict())
    by_torch = quantized(case)
    by_torch.load_state_dict(source.state_dict())
    assert same_state(model, by_torch)
    for module in model.modules():
        if hasattr(module, 'disable_quant'):
            module.disable_quant = True
    model.quantization.calibrated = True
    assert distance(output(model, images(2)), output(source, images(2))) <= 1e-5


def test_loading_a_float_checkpoint_is_reported(lines: list[logging.LogRecord]) -> None:
    model = quantized(DECONV)
    to_read(DECONV)
    lines.clear()
    model.load_state_dict(float_model(DECONV).state_dict())
    weights = sum('tensor_quant' not in name for name, _ in to_read(DECONV).named_parameters())
    layers = len(to_read(DECONV).quantization.quantized)
    message = f'Loaded the checkpoint of a float model: all {weights} weights, {2 * layers} quantizers to be calibrated'
    assert [(line.levelname, line.getMessage()) for line in lines] == [('INFO', message)]


def test_weights_of_another_shape_are_not_counted_as_loaded(lines: list[logging.LogRecord]) -> None:
    model, state = toy(), toy().state_dict()
    name = next(name for name in state if name.endswith('.bias'))
    state[name] = torch.zeros(1 + len(state[name]))
    load_state_dict(model, state, strict=False, logger='silent')
    said = [line.getMessage() for line in lines if line.getMessage().startswith('Loaded the checkpoint')]
    assert said == ['Loaded the checkpoint of a quantized model: 7 of 8 weights, 8 quantizers to be calibrated']


@pytest.mark.parametrize('gone', ['head.final_layer.weight', 'backbone.conv1.weight', 'backbone.bn1.weight'])
def test_other_missing_weights_are_refused_and_named(gone: str, load: Load) -> None:
    model = quantized(DECONV, fold_batchnorm=False)
    state = float_model(DECONV).state_dict()
    del state[gone]
    state['other.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointMismatchError) as caught:
        load(model, state)
    message = str(caught.value)
    assert message.startswith(
        '1 weights of the model are not in the checkpoint (only those of quantizers may be missing)'
    )
    assert gone in message
    assert 'other.weight' in message


def test_a_checkpoint_of_another_model_is_refused(load: Load) -> None:
    with pytest.raises(CheckpointMismatchError, match=r'are not in the checkpoint .* and \d+ more; in it and not in'):
        load(quantized(DECONV), float_model(RLE).state_dict())


def test_counters_of_batches_may_be_missing() -> None:
    """Checkpoints from before PyTorch 0.4.1 have none, and MMEngine does not ask for them."""
    state = float_model(DECONV, seed=1).state_dict()
    state = {name: value for name, value in state.items() if 'num_batches_tracked' not in name}
    model, expected = quantized(DECONV), quantized(DECONV)
    model.load_state_dict(state)
    expected.load_state_dict(float_model(DECONV, seed=1).state_dict())
    assert same_state(model, expected)


def test_keys_that_are_not_used_are_reported(load: Load, lines: list[logging.LogRecord]) -> None:
    state = float_model(DECONV).state_dict() | {f'teacher.{i}': torch.zeros(1) for i in range(7)}
    load(quantized(DECONV), state)
    warned = [line.getMessage() for line in lines if line.levelname == 'WARNING' and 'Loaded' in line.getMessage()]
    assert len(warned) == 1
    assert warned[0].endswith('not used: teacher.0, teacher.1, teacher.2, teacher.3 and 3 more')


def test_float_weights_in_a_calibrated_model_call_for_calibration() -> None:
    model = calibrated_toy()
    assert is_calibrated(model)
    source = {
        name: value * 3 for name, value in model.state_dict().items() if name.rpartition('.')[2] in ('weight', 'bias')
    }
    model.load_state_dict(source)
    assert not is_calibrated(model)
    with pytest.raises(RuntimeError, match='has not been calibrated'):
        output(model, images(1, 0, (8, 8)))
    calibrate(model, BATCHES)
    expected = toy()
    expected.load_state_dict(source)
    calibrate(expected, BATCHES)
    assert same_state(model, expected)


# ------------------------------------------------------------------ a quantized model's
@EVERY
def test_saved_and_loaded_it_computes_the_same_without_calibration(case: Case, load_file: Load) -> None:
    source, model = to_read(case), quantized(case)
    load_file(model, through_disk(source.state_dict()))
    assert is_calibrated(model)
    assert same_state(model, source)
    assert torch.equal(output(model, images(2)), output(source, images(2)))


@pytest.mark.slow
def test_every_kind_of_quantizer_is_saved_and_loaded(load: Load) -> None:
    for changes in (
        dict(weight_scales='statistics'),
        dict(weight_symmetric=False, act_symmetric=False, scale_init='mse'),
        dict(weight_symmetric=False, weight_granularity='tensor'),
        dict(act_scales='fixed', act_symmetric=False),
        dict(skip='b', last_layers='float'),
        dict(fold_batchnorm=False, weight_bit_width=2),
    ):
        source, model = calibrated_toy(**changes), toy(**changes)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.1)  # as training does
        load(model, through_disk(source.state_dict()))
        inputs = images(2, 1, (8, 8))
        assert torch.equal(output(model, inputs), output(source, inputs)), changes
        flags = [parameter.requires_grad for parameter in model.parameters()]
        assert flags == [parameter.requires_grad for parameter in source.parameters()]


def test_a_quantized_model_loaded_into_a_calibrated_one_replaces_its_scales(load: Load) -> None:
    source, model = calibrated_toy(), calibrated_toy()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    load(model, source.state_dict())
    assert same_state(model, source)
    inputs = images(2, 1, (8, 8))
    assert torch.equal(output(model, inputs), output(source, inputs))


def test_a_checkpoint_from_before_calibration_loads_and_calls_for_it(
    load: Load, lines: list[logging.LogRecord]
) -> None:
    model = toy()
    load(model, toy().state_dict())
    assert not is_calibrated(model)
    assert 'a quantized model: all 8 weights, 8 quantizers to be calibrated' in lines[-1].getMessage()


# ------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize(
    ('ours', 'message'),
    [
        (dict(weight_bit_width=2), r'with 2 layers W8A8, 2 layers W4A4, and .* one with 2 layers W8A8, 2 layers W2A4'),
        (dict(act_bit_width=8), 'makes one with 2 layers W8A8, 2 layers W4A8'),
        (dict(first_layers=6), 'makes one with 1 layers W6A6, 2 layers W4A4, 1 layers W8A8'),
        (dict(layers=[dict(pattern='c', act_bit_width=2)]), 'with 2 layers W8A8, 1 layers W4A4, 1 layers W4A2'),
        (dict(skip='b'), 'makes one with 2 layers W8A8, 1 layers W4A4'),
        (dict(weight_granularity='tensor'), 'use the policy that it was trained with'),
        (dict(weight_symmetric=False), 'use the policy that it was trained with'),
        (dict(act_symmetric=False), 'use the policy that it was trained with'),
        (dict(fold_batchnorm=False), '4 weights of the model are not in the checkpoint .*: n.weight, n.bias'),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_is_quantized_in_another_way_is_refused(ours: dict[str, Any], message: str, load: Load) -> None:
    model = toy(**ours)
    with pytest.raises(CheckpointMismatchError, match=message):
        load(model, calibrated_toy().state_dict())


def test_the_same_bits_in_other_layers_are_refused(load: Load) -> None:
    with pytest.raises(CheckpointMismatchError, match=r'no values for 2 quantizers \(the first is b\.input_quant'):
        load(toy(skip='c'), calibrated_toy(skip='b').state_dict())


def test_scales_that_were_not_trained_are_missing(load: Load) -> None:
    source = calibrated_toy(weight_scales='statistics')
    with pytest.raises(CheckpointMismatchError, match=r'no values for 4 quantizers \(the first is a\.weight_quant'):
        load(toy(), source.state_dict())


def test_a_quantized_model_whose_batchnorm_would_have_to_be_folded_is_refused(load: Load) -> None:
    """Its scales are those of the weights before folding."""
    with pytest.raises(
        CheckpointMismatchError, match=r'with a BatchNorm n, which the config folds into a: .*fold_batch'
    ):
        load(toy(), calibrated_toy(fold_batchnorm=False).state_dict())


def test_the_error_is_one_that_tools_print_as_a_line() -> None:
    from mm_sharp.errors import UserError

    assert issubclass(CheckpointMismatchError, UserError)
    assert issubclass(CheckpointMismatchError, ValueError)


# ------------------------------------------------------------------ the optimizer
@pytest.mark.parametrize('kind', ['float', 'quantized'])
def test_parameters_stay_the_objects_that_the_optimizer_knows(kind: str, load: Load) -> None:
    model = quantized(DECONV)
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load(model, (to_read(DECONV) if kind == 'quantized' else float_model(DECONV, seed=1)).state_dict())
    if kind == 'float':
        calibrate(model, samples(1))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    scales = {name: parameter.detach().clone() for name, parameter in after.items() if 'tensor_quant' in name}
    model.train()(images(2), None, mode='tensor').square().sum().backward()
    optimizer.step()
    moved = [name for name, value in scales.items() if not torch.equal(value, after[name])]
    assert len(moved) > 0.9 * len(scales)


# ------------------------------------------------------------------ averaged weights
@pytest.mark.slow
def test_an_average_of_weights_is_saved_and_loaded() -> None:
    model = calibrated(DECONV)
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    average.update_parameters(model)
    for value, latest in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.allclose(value, latest * (1.1 / 1.2), rtol=1e-5)
    expected = output(average.module, images(2))
    assert not torch.equal(expected, output(model, images(2)))

    state = through_disk(average.state_dict())
    fresh = ExponentialMovingAverage(quantized(DECONV))
    fresh.load_state_dict(state)
    assert is_calibrated(fresh.module)
    assert torch.equal(output(fresh.module, images(2)), expected)
    # Of a quantized model and of its average alike: what does not fit is refused.
    with pytest.raises(CheckpointMismatchError, match='use the policy'):
        ExponentialMovingAverage(quantized(DECONV, weight=8)).load_state_dict(state)


@pytest.mark.slow
def test_mmengines_hook_loads_float_and_quantized_checkpoints_into_its_average() -> None:
    """It does so strictly, when a Runner loads a checkpoint."""

    class Runner:
        _resume = False

    hook = EMAHook()
    for source in (float_model(DECONV, seed=1), to_read(DECONV)):
        hook.ema_model = ExponentialMovingAverage(quantized(DECONV))
        hook.after_load_checkpoint(Runner(), {'state_dict': source.state_dict()})
        expected = quantized(DECONV)
        expected.load_state_dict(source.state_dict())
        assert same_state(hook.ema_model.module, expected)
        assert is_calibrated(hook.ema_model.module) is (source is to_read(DECONV))
