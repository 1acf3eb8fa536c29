"""FreezeHook: what is frozen does not change by a bit, under every optimizer and wrapper; before, it does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

import tests.quantized_toys  # noqa: F401  # registers its toys
from mm_sharp.quantization import FreezeHook, QuantizationPolicy, quantize
from tests.distributed import run
from tests.quantized_toys import ResidualToy, policy
from tests.tiny_runs import record_warnings
from tests.toys import ToyNet, make, same_bits, toy_config

ITERATIONS = 5  # of one epoch
OPTIMIZERS: dict[str, dict[str, Any]] = {
    'SGD': dict(type='SGD', lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    'AdamW': dict(type='AdamW', lr=1e-2, weight_decay=0.1),
    'RMSprop': dict(type='RMSprop', lr=1e-3, momentum=0.9, weight_decay=0.1),
}
PERTURBED: dict[str, Any] = dict(rho=0.05, perturb='all')
WRAPPERS: dict[str, dict[str, Any]] = {
    'OptimWrapper': dict(type='OptimWrapper'),
    'SAM': dict(type='SAMOptimWrapper', **PERTURBED),
    'ASAM, float16': dict(type='SAMOptimWrapper', adaptive=True, dtype='float16', **PERTURBED),
    'ESAM': dict(type='ESAMOptimWrapper', **PERTURBED),
    'AUSAM': dict(type='AUSAMOptimWrapper', **PERTURBED),
}


class TensorQuant(nn.Module):
    """Stands in for a quantizer: a scale and a zero point that the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.zero_point = nn.Parameter(torch.tensor(0.1))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale + self.zero_point


@MODELS.register_module()
class ScaledToy(ToyNet):
    """A ``ToyNet`` with two stand-ins for quantizers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.input_quant, self.act_quant = nn.Module(), nn.Module()
        self.input_quant.tensor_quant, self.act_quant.tensor_quant = TensorQuant(), TensorQuant()

    def features(self, inputs: Tensor) -> Tensor:
        return self.act_quant.tensor_quant(super().features(self.input_quant.tensor_quant(inputs)))


class Recorder(Hook):
    """Keeps the model's state after every iteration, by name, and the modes of its modules."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.training: list[dict[str, bool]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = getattr(runner.model, 'module', runner.model)
        self.states.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.training.append({name: module.training for name, module in model.named_modules()})

    def changes(self, names: list[str]) -> list[bool]:
        """For every iteration but the first, whether it changed any of ``names``."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [any(not same_bits(before[name], after[name]) for name in names) for before, after in pairs]

    def names(self, part: str) -> list[str]:
        return [name for name in self.states[0] if part in name]


def build(work_dir: Path, freeze: dict[str, Any], **changes: Any) -> tuple[Runner, Recorder]:
    """A Runner over four epochs of :data:`ITERATIONS` steps, with what it goes through."""
    hooks = [dict(type='FreezeHook', **freeze)]
    config = toy_config(work_dir, train_cfg=dict(by_epoch=True, max_epochs=4), custom_hooks=hooks)
    config.update(model=dict(type='ScaledToy'), optim_wrapper=wrapped('OptimWrapper', 'SGD'))
    recorder = Recorder()
    runner = Runner(**{**config, **changes})
    runner.register_hook(recorder, priority='LOWEST')
    return runner, recorder


def train(work_dir: Path, freeze: dict[str, Any], **changes: Any) -> tuple[Runner, Recorder]:
    runner, recorder = build(work_dir, freeze, **changes)
    runner.train()
    return runner, recorder


def wrapped(wrapper: str, optimizer: str, **options: Any) -> dict[str, Any]:
    """With weight decay for the scales, which must not move them either."""
    decay = dict(custom_keys={'tensor_quant': dict(decay_mult=1.0)})
    return copy.deepcopy({**WRAPPERS[wrapper], 'optimizer': OPTIMIZERS[optimizer], 'paramwise_cfg': decay, **options})


def from_then_on(changes: list[bool], epochs: int) -> None:
    """Every iteration before the end of so many epochs changed something, none after it did."""
    first = epochs * ITERATIONS - 1  # the first entry of `changes` is the second iteration's
    assert all(changes[:first])
    assert not any(changes[first:])


# ---------------------------------------------------------------- what is frozen
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_what_is_frozen_does_not_change_by_a_bit(tmp_path: Path, wrapper: str, optimizer: str) -> None:
    wrapper_cfg = wrapped(wrapper, optimizer, clip_grad=dict(max_norm=1.0))
    _, seen = train(tmp_path, dict(batchnorm_stats=1, quantizer_scales=2), optim_wrapper=wrapper_cfg)
    scales = seen.names('tensor_quant')
    assert len(scales) == 4
    for scale in scales:
        from_then_on(seen.changes([scale]), 2)
    from_then_on(seen.changes(['norm.running_mean', 'norm.running_var']), 1)
    from_then_on(seen.changes(['norm.num_batches_tracked']), 1)
    for trained in ('norm.weight', 'norm.bias', 'conv.weight', 'head.weight'):
        assert all(seen.changes([trained]))


def test_only_batchnorm_goes_into_evaluation_mode(tmp_path: Path) -> None:
    _, seen = train(tmp_path, dict(batchnorm_stats=1))
    assert all(all(modes.values()) for modes in seen.training[:ITERATIONS])
    for modes in seen.training[ITERATIONS:]:
        assert [name for name, training in modes.items() if not training] == ['norm']
    assert all(seen.changes(seen.names('tensor_quant')))


def test_from_the_beginning(tmp_path: Path) -> None:
    runner, recorder = build(tmp_path, dict(batchnorm_stats=0, quantizer_scales=0))
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    after = recorder.states[-1]
    frozen = [name for name in after if same_bits(before[name], after[name])]
    assert frozen == [name for name in after if 'tensor_quant' in name or 'running' in name or 'batches' in name]


@pytest.mark.parametrize(
    ('wrapper', 'counts'),
    [('OptimWrapper', 1), ('SAM', 1), ('OptimWrapper', 4)],  # of 4: the second begins before the freezing
)
def test_frozen_scales_have_no_part_in_a_norm(tmp_path: Path, wrapper: str, counts: int) -> None:
    """Neither in the one that gradients are clipped by, nor in the perturbation."""
    options = dict(clip_grad=dict(max_norm=1.0), accumulative_counts=counts)
    runner, _ = build(tmp_path, dict(quantizer_scales=1), optim_wrapper=wrapped(wrapper, 'SGD', **options))
    parts: list[float] = []
    moved: list[bool] = []

    class Watch(Hook):
        def before_train(self, runner: Any) -> None:
            scales = [p for name, p in runner.model.named_parameters() if 'tensor_quant' in name]
            values: list[list[Tensor]] = []
            clip = runner.optim_wrapper._clip_grad

            def noting() -> None:
                parts.append(sum(float(scale.grad.abs()) for scale in scales))
                moved.append(any(not same_bits(a, b) for a, b in zip(values[0], values[-1], strict=True)))
                values.clear()
                clip()

            runner.optim_wrapper._clip_grad = noting
            runner.model.register_forward_pre_hook(lambda *_: values.append([s.detach().clone() for s in scales]))

    runner.register_hook(Watch())
    runner.train()
    before, after = ITERATIONS // counts, 4 * ITERATIONS // counts - ITERATIONS // counts
    assert all(part > 0 for part in parts[:before])
    assert parts[before:] == [0.0] * after
    assert moved == [wrapper == 'SAM'] * before + [False] * after


def test_gradients_accumulated_before_do_not_move_scales(tmp_path: Path) -> None:
    """Cycles of 4 micro-batches do not end with epochs of 5."""
    wrapper = wrapped('OptimWrapper', 'SGD', accumulative_counts=4)
    _, seen = train(tmp_path, dict(quantizer_scales=1), optim_wrapper=wrapper)
    changed = seen.changes(seen.names('tensor_quant'))
    assert [index + 2 for index, changes in enumerate(changed) if changes] == [4]


def test_iteration_based_training_counts_passes_over_the_data(tmp_path: Path) -> None:
    loader = toy_config(tmp_path)['train_dataloader']
    loader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
    _, seen = train(
        tmp_path,
        dict(batchnorm_stats=1, quantizer_scales=2),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=4 * ITERATIONS),
        log_processor=dict(by_epoch=False),
    )
    from_then_on(seen.changes(['norm.running_mean']), 1)
    from_then_on(seen.changes(seen.names('tensor_quant')), 2)


def test_scales_of_several_optimizers() -> None:
    model = make(ScaledToy)
    scales = [p for name, p in model.named_parameters() if 'tensor_quant' in name]
    optimizers = [torch.optim.SGD(scales[:2], lr=1.0, momentum=0.9), torch.optim.Adam(scales[2:], lr=1.0)]
    wrappers = {str(index): OptimWrapper(optimizer) for index, optimizer in enumerate(optimizers)}
    loop = object.__new__(EpochBasedTrainLoop)
    runner = SimpleNamespace(
        model=model, optim_wrapper=OptimWrapperDict(**wrappers), train_loop=loop, epoch=0, max_epochs=2
    )
    hook = FreezeHook(quantizer_scales=1)
    hook.before_train(runner)
    values = []
    for runner.epoch in (0, 0, 1, 1):
        hook.before_train_iter(runner, 0)
        sum(scale.square() for scale in scales).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values.append([scale.item() for scale in scales])
    assert values[0] != values[1] == values[2] == values[3]


# ---------------------------------------------------------------- resuming, ranks, afterwards
@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AUSAM'])
def test_resumed_equals_never_stopped(tmp_path: Path, wrapper: str) -> None:
    freeze = dict(batchnorm_stats=1, quantizer_scales=2)
    changes = dict(
        optim_wrapper=wrapped(wrapper, 'AdamW'),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
    )
    _, straight = train(tmp_path / 'straight', freeze, **changes)
    for epoch in (1, 2, 3):
        checkpoint = str(tmp_path / 'straight' / f'epoch_{epoch}.pth')
        _, resumed = train(tmp_path / f'resumed{epoch}', freeze, resume=True, load_from=checkpoint, **changes)
        assert len(resumed.states) == (4 - epoch) * ITERATIONS
        for ours, theirs in zip(resumed.states, straight.states[epoch * ITERATIONS :], strict=True):
            assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def train_ranks(rank: int, processes: int, folder: str) -> dict[str, list[dict[str, Any]]]:
    """What every rank's model goes through, for some wrappers."""
    results = {}
    ddp = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    for wrapper in ('OptimWrapper', 'SAM', 'AUSAM'):
        _, seen = train(
            Path(folder) / wrapper,
            dict(batchnorm_stats=2, quantizer_scales=2),
            optim_wrapper=wrapped(wrapper, 'SGD'),
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=ddp),
        )
        results[wrapper] = [{name: value.numpy() for name, value in state.items()} for state in seen.states]
    return results


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    ranks = run(train_ranks, 2, str(tmp_path))
    steps = 3  # of an epoch: 20 samples in batches of 4 on 2 ranks
    for states in zip(*(rank.values() for rank in ranks), strict=True):
        first, second = states
        assert len(first) == 4 * steps
        for name in first[0]:
            frozen = 'tensor_quant' in name or 'running' in name
            if frozen:
                assert all(np.array_equal(state[name], first[-1][name]) for state in first[2 * steps :])
                assert not np.array_equal(first[2 * steps - 1][name], first[0][name])
            else:
                assert not np.array_equal(first[-1][name], first[2 * steps][name]) or 'batches' in name
            assert np.array_equal(first[-1][name], second[-1][name])
        assert not np.array_equal(first[2 * steps - 1]['norm.running_mean'], second[2 * steps - 1]['norm.running_mean'])


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    runner, _ = train(tmp_path, dict(quantizer_scales=1))
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
    scale = runner.model.act_quant.tensor_quant.scale
    (2 * scale).backward()
    assert scale.grad == 2


@pytest.mark.slow
def test_a_model_of_brevitas(tmp_path: Path) -> None:
    """With zero points, calibrated by the run itself, perturbed by SAM."""
    model = quantize(make(ResidualToy), QuantizationPolicy.from_config(policy('zero points')))
    loader = toy_config(tmp_path)['train_dataloader']
    loader['dataset'] = dict(type='ResidualSamples', count=20)
    _, seen = train(
        tmp_path,
        dict(batchnorm_stats=1, quantizer_scales=2),
        model=model,
        train_dataloader=loader,
        optim_wrapper=wrapped('SAM', 'SGD'),
    )
    parameters = {name for name, _ in model.named_parameters()}
    scales = [name for name in seen.names('tensor_quant') if name in parameters]
    assert any('zero_point' in name for name in scales)
    assert all(seen.changes(scales)[: 2 * ITERATIONS - 1])
    assert not any(seen.changes(seen.names('tensor_quant'))[2 * ITERATIONS - 1 :])
    from_then_on(seen.changes(seen.names('running_mean')), 1)
    assert all(seen.changes(['conv.weight']))


# ---------------------------------------------------------------- what is said
def test_freezing_is_logged_once(tmp_path: Path) -> None:
    train(tmp_path, dict(batchnorm_stats=1, quantizer_scales=2), log_level='INFO')
    (log,) = tmp_path.glob('*/*.log')
    lines = [line.partition('INFO - ')[2] for line in log.read_text().splitlines() if 'frozen' in line]
    assert lines == [
        'From epoch 2 on, the statistics of 1 BatchNorm layers are frozen',
        'From epoch 3 on, 4 scales and zero points of quantizers are frozen',
    ]


@pytest.mark.parametrize(
    ('model', 'freeze', 'warning'),
    [
        (
            'ToyNet',
            dict(batchnorm_stats=1, quantizer_scales=1),
            'quantizer_scales=1 has no effect: the model has no',
        ),
        ('ScaledToy', dict(batchnorm_stats=1), 'batchnorm_stats=1 has no effect: the model has no BatchNorm layers'),
        ('ScaledToy', dict(quantizer_scales=4), 'quantizer_scales=4 has no effect: training ends after 4 epochs'),
    ],
)
def test_what_has_no_effect_is_said(tmp_path: Path, model: str, freeze: dict[str, Any], warning: str) -> None:
    norm = 'BatchNorm' not in warning
    runner, seen = build(tmp_path, freeze, model=dict(type=model, norm=norm))
    with record_warnings(runner) as lines:
        runner.train()
    assert [line for line in lines if 'FreezeHook' in line] == [line for line in lines if warning in line]
    assert any(warning in line for line in lines)
    if model == 'ToyNet':
        from_then_on(seen.changes(['norm.running_mean']), 1)


@pytest.mark.parametrize('value', [-1, 1.0, '3', True])
@pytest.mark.parametrize('name', ['batchnorm_stats', 'quantizer_scales'])
def test_wrong_epochs(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        FreezeHook(**{name: value})
    message = str(caught.value)
    assert message.startswith(f'FreezeHook: {name}={value!r} is not allowed: it must be None or an integer of at least')
    assert "custom_hooks = [dict(type='FreezeHook'" in message


def test_nothing_to_freeze_is_refused() -> None:
    with pytest.raises(ValueError, match='would freeze nothing'):
        FreezeHook()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def test_data_without_length_cannot_count_epochs(tmp_path: Path) -> None:
    runner, _ = build(
        tmp_path,
        dict(quantizer_scales=1),
        train_dataloader=torch.utils.data.DataLoader(Endless(), batch_size=4),
        train_cfg=dict(by_epoch=False, max_iters=4),
        log_processor=dict(by_epoch=False),
    )
    with pytest.raises(ValueError, match='the training set has no length'):
        runner.train()
