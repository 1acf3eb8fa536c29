"""Sharpness-aware training of quantized models in whole runs: resuming, two processes, averaging, a real model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import SGD, Adam

from mm_sharp.quantization import calibrate, is_calibrated
from tests.distributed import run
from tests.mmpose_cases import QUIET
from tests.quantized_toys import (
    Parameters,
    ResidualToy,
    Watch,
    batches,
    copy_parameters,
    is_spared,
    parameters_of,
    plain_state,
    policy,
    pool_batches,
    quantized,
    simcc,
    slow_sgd,
    uncalibrated,
    unequal,
)
from tests.toys import make, same_bits, same_state, toy_config
from tests.wrappers import build

pytestmark = QUIET

RESUMED = {
    'sam': 'W4A4',
    'asam': 'zero points',
    'sam-interval': 'W8A8',
    'looksam': 'W4A4',
    'friendlysam': 'W4A4',
    'gsam': 'W8A8',
    'wsam': 'W4A4',
    'msam': 'W2A4 folded',
    'esam': 'W2A4 folded',
    'esam-history': 'W4A4',
    'ausam': 'W8A8',
    'ausam-reweight': 'W2A4 folded',
}
WRAPPERS: dict[str, dict[str, Any]] = {
    'sam': dict(type='SAMOptimWrapper'),
    'sam synced': dict(type='SAMOptimWrapper', sync_perturbation=True),
    'esam': dict(type='ESAMOptimWrapper'),
    'ausam': dict(type='AUSAMOptimWrapper'),
}


# ------------------------------------------------------------------ resuming
@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        pytest.param(name, kind, marks=() if name in ('sam', 'asam', 'esam', 'ausam') else pytest.mark.slow)
        for name, kind in RESUMED.items()
    ],
)
def test_resuming_equals_never_having_stopped(name: str, kind: str, tmp_path: Path) -> None:
    """The optimizer is built before the weights are loaded, as MMEngine does it."""
    data = pool_batches(6)
    straight, stopped, resumed = quantized(kind), quantized(kind), uncalibrated(kind, seed=1)
    torch.manual_seed(11)
    wrapper = build(name, straight, slow_sgd(straight))
    for batch in data:
        straight.train_step(batch, wrapper)

    torch.manual_seed(11)
    first = build(name, stopped, slow_sgd(stopped))
    for batch in data[:3]:
        stopped.train_step(batch, first)
    torch.save({'model': stopped.state_dict(), 'optimizer': first.state_dict()}, tmp_path / 'state.pth')

    torch.manual_seed(99)
    second = build(name, resumed, slow_sgd(resumed))
    saved = torch.load(tmp_path / 'state.pth', weights_only=True)
    assert not is_calibrated(resumed)
    resumed.load_state_dict(saved['model'])
    second.load_state_dict(saved['optimizer'])
    assert is_calibrated(resumed)
    assert same_bits(output_of(resumed), output_of(stopped))
    second.initialize_count_status(resumed, 3, 6)
    for batch in data[3:]:
        resumed.train_step(batch, second)
    assert same_state(straight, resumed)
    assert same_bits(output_of(straight), output_of(resumed))


def output_of(model: nn.Module) -> torch.Tensor:
    """What inference gives for a few samples; the model ends in training mode."""
    model.eval()
    with torch.no_grad():
        output = model(batches(1, seed=3)[0]['inputs'], None, mode='tensor')
    model.train()
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['W8A8', 'W4A4', 'zero points'])
def test_a_copy_made_before_calibration_is_calibrated_on_its_own(kind: str) -> None:
    """As those of averaging hooks are made."""
    model = uncalibrated(kind)
    twin = copy.deepcopy(model)
    calibrate(twin, batches(2))
    assert is_calibrated(twin)
    assert not is_calibrated(model)
    calibrate(model, batches(2))
    assert not unequal(parameters_of(model), parameters_of(twin))


# ------------------------------------------------------------------ Runners
class ParameterLog(Hook):
    """The model's parameters, and the averaged model's, when training starts and after each iteration."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.seen: list[Parameters] = []
        self.averaged: list[Parameters] = []
        self.calibrated: list[bool] = []

    def before_train(self, runner: Runner) -> None:
        self.after_train_iter(runner, 0)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = getattr(runner.model, 'module', runner.model)
        self.seen.append(parameters_of(model))
        self.calibrated.append(is_calibrated(model))
        for hook in averaging(runner):
            self.averaged.append(parameters_of(hook.ema_model.module))
            self.calibrated.append(is_calibrated(hook.ema_model.module))


def averaging(runner: Runner) -> list[EMAHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


@pytest.fixture(scope='module')
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a float toy, as a Runner saves it."""
    path = tmp_path_factory.mktemp('float') / 'float.pth'
    torch.save({'state_dict': make(ResidualToy, seed=2).state_dict(), 'meta': {}}, path)
    return path


def runner_of(work_dir: Path, name: str, float_checkpoint: Path, seed: int = 0, **changes: Any) -> Runner:
    """Training of a quantized toy from a float model's checkpoint; ``seed`` is that of its samples."""
    optimizer = dict(type='SGD', lr=0.01, momentum=0.9)
    config = toy_config(
        work_dir,
        model=dict(type='QuantizedModel', model='ResidualToy', policy=policy('W4A4')),
        optim_wrapper=dict(WRAPPERS[name], optimizer=optimizer),
        load_from=str(float_checkpoint),
        custom_hooks=[],
        **changes,
    )
    config['train_dataloader']['dataset'] = dict(type='ResidualSamples', count=20, seed=seed)
    return Runner.from_cfg(config)


# ------------------------------------------------------------------ two processes
def train_on_ranks(rank: int, processes: int, folder: str, float_checkpoint: str) -> dict[str, Any]:
    """One epoch of every wrapper; the parameters before it and after each step, as arrays."""
    found: dict[str, Any] = {}
    for name in WRAPPERS:
        runner = runner_of(
            Path(folder) / name,
            name,
            Path(float_checkpoint),
            # Other samples on each rank, for calibration too: what one rank finds there must reach the other.
            seed=rank,
            launcher='pytorch',
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None),
            train_cfg=dict(by_epoch=True, max_epochs=1),
        )
        log = ParameterLog()
        runner.register_hook(log)
        runner.train()
        found[name] = [{key: value.numpy() for key, value in seen.items()} for seen in log.seen]
        found[f'{name} calibrated'] = log.calibrated
        found[f'{name} norm'] = runner.optim_wrapper.last_step.grad_norm.item()
    return found


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory, float_checkpoint: Path) -> list[dict[str, Any]]:
    return run(train_on_ranks, 2, str(tmp_path_factory.mktemp('ranks')), str(float_checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize('name', WRAPPERS)
def test_both_ranks_hold_the_same_weights_and_scales_after_every_step(ranks: list[dict[str, Any]], name: str) -> None:
    left, right = (rank[name] for rank in ranks)
    assert len(left) == len(right) == 4
    for ours, theirs in zip(left, right, strict=True):
        assert [key for key in ours if ours[key].tobytes() != theirs[key].tobytes()] == []
    assert all(all(rank[f'{name} calibrated']) for rank in ranks)
    scales = [key for key in left[0] if 'tensor_quant' in key]
    assert all((left[0][key] != 1).any() for key in scales)
    for before, after in itertools.pairwise(left):
        changed = {key for key in before if (before[key] != after[key]).any()}
        assert changed >= {*scales, 'conv.weight', 'head.weight', 'head.bias'}
    norms = [rank[f'{name} norm'] for rank in ranks]
    assert (norms[0] == norms[1]) == (name == 'sam synced'), 'each rank climbs by its own gradient, unless synced'


# ------------------------------------------------------------------ averaging
@pytest.mark.slow
@pytest.mark.parametrize('update_buffers', [False, True])
def test_the_averaged_model_starts_from_the_calibrated_one(
    tmp_path: Path, float_checkpoint: Path, update_buffers: bool
) -> None:
    average = dict(type='EMAHook', momentum=0.5, update_buffers=update_buffers)
    runner = runner_of(tmp_path, 'sam', float_checkpoint)
    runner.register_hook(average)
    log = ParameterLog()
    runner.register_hook(log)
    runner.train()
    assert all(log.calibrated)
    assert not unequal(log.averaged[0], log.seen[0])
    assert all((value != 1).any() for name, value in log.averaged[0].items() if 'tensor_quant' in name)
    # MMEngine's first update copies; from then on it is the average.
    assert not unequal(log.averaged[1], log.seen[1])
    for name, value in log.averaged[2].items():
        torch.testing.assert_close(value, (log.seen[1][name] + log.seen[2][name]) / 2)

    (hook,) = averaging(runner)
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    averaged, trained = uncalibrated(seed=1), uncalibrated(seed=1)
    averaged.load_state_dict(saved['state_dict'])
    trained.load_state_dict(
        {name.removeprefix('module.'): value for name, value in saved['ema_state_dict'].items() if name != 'steps'}
    )
    assert is_calibrated(averaged)
    assert is_calibrated(trained)
    assert same_bits(output_of(averaged), output_of(hook.ema_model.module))
    assert same_bits(output_of(trained), output_of(runner.model))
    assert not same_bits(output_of(averaged), output_of(trained))


@pytest.mark.slow
def test_a_resumed_run_with_averaging_equals_one_that_never_stopped(tmp_path: Path, float_checkpoint: Path) -> None:
    """Nothing is calibrated again, in the averaged model neither."""
    runs = []
    for folder, epochs, checkpoint in (
        ('straight', 2, None),
        ('stopped', 1, None),
        ('stopped', 2, tmp_path / 'stopped' / 'epoch_1.pth'),
    ):
        # Runners of the same name and second share a log.
        own = dict(experiment_name=f'{tmp_path.name}{len(runs)}', train_cfg=dict(by_epoch=True, max_epochs=epochs))
        runner = runner_of(tmp_path / folder, 'ausam', checkpoint or float_checkpoint, resume=bool(checkpoint), **own)
        runner.register_hook(dict(type='EMAHook', momentum=0.5))
        runner.train()
        runs.append(runner)
    straight, _, resumed = runs
    assert same_state(straight.model, resumed.model)
    assert same_state(averaging(straight)[0].ema_model, averaging(resumed)[0].ema_model)
    assert unequal(parameters_of(straight.model), parameters_of(averaging(straight)[0].ema_model.module))


# ------------------------------------------------------------------ a real model
@pytest.mark.slow
@pytest.mark.parametrize('name', [pytest.param('sam', marks=pytest.mark.slow), 'ausam'])
def test_the_demos_model_keeps_what_the_base_optimizers_pass_leaves(name: str) -> None:
    """SimCC ResNet-18, an eighth as wide, with BatchNorm; all of it is perturbed or spared, and trained."""
    start, batch = simcc()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    wrapper = build(name, ours, Adam(ours.parameters(), lr=1e-3), whole=True)
    base = OptimWrapper(SGD(theirs.parameters(), lr=0.0))
    watch = Watch(ours)
    for _ in range(2):
        copy_parameters(ours, theirs)
        theirs.train_step(copy.deepcopy(batch), base)
        ours.train_step(copy.deepcopy(batch), wrapper)
        assert plain_state(ours) == plain_state(theirs)
    first, second, *_ = watch.seen
    moved = unequal(first, second)
    assert moved >= {f'{layer.name}.weight' for layer in start.quantization.quantized}
    assert not any(is_spared(name) for name in moved)
    assert unequal(parameters_of(start), parameters_of(ours)) == set(first)
    assert wrapper.last_step.perturbed_loss != wrapper.last_step.loss
