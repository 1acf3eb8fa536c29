"""Iterative weight freezing: the paper's recursion by hand, over steps of SAM; gradients, resuming, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from brevitas.core.quant import IntQuant
from mmengine.runner import Runner
from torch import Tensor
from torch.optim import AdamW

from mm_sharp.methods.sam import SAMOptimWrapper
from mm_sharp.quantization import OscillationHook, QuantizationPolicy, quantize
from mm_sharp.quantization.int_quant import FrozenWeights
from mm_sharp.quantization.oscillation_hook import FROZEN, SCALAR, STATE, weight_integers
from tests.quantized_toys import ResidualToy, Watch, batches, policy, quantized
from tests.tiny_runs import record_warnings
from tests.toys import make, same_bits, toy_config

FAST: dict[str, Any] = dict(momentum=0.2, freeze=(0.15, 0.02), interval=1)  # within some tens of steps


class Hub:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def update_scalar(self, name: str, value: float) -> None:
        self.logged[name] = value


class ByHand:
    """The recursion, weight by weight."""

    def __init__(self, integers: np.ndarray) -> None:
        self.last = integers.astype(int)
        self.direction, self.frequency = np.zeros(len(integers)), np.zeros(len(integers))
        self.average, self.frozen = integers.astype(float), [None] * len(integers)

    def add(self, integers: np.ndarray, momentum: float, threshold: float) -> None:
        for i, new in enumerate(integers.astype(int)):
            if self.frozen[i] is not None:
                continue
            change = np.sign(new - self.last[i])
            oscillates = change * self.direction[i] == -1
            self.frequency[i] = momentum * oscillates + (1 - momentum) * self.frequency[i]
            self.direction[i], self.last[i] = change or self.direction[i], new
            if self.frequency[i] > threshold:
                self.frozen[i] = round(self.average[i])
            self.average[i] = momentum * new + (1 - momentum) * self.average[i]


def flat(integers: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([value.flatten() for value in integers.values()]).numpy()


def test_weights_freeze_as_the_recursion_by_hand_says() -> None:
    """30 steps of SAM under AdamW, whose momentum and decay would move frozen weights."""
    model, steps = quantized('W4A4'), 30
    wrapper = SAMOptimWrapper(AdamW(model.parameters(), lr=0.01, weight_decay=0.1), rho=0.1)
    wrapper.initialize_count_status(model, 0, steps)
    hook = OscillationHook(**FAST)
    runner = SimpleNamespace(model=model, message_hub=Hub(), iter=0, max_iters=steps)
    hook.before_train(runner)
    by_hand, watch = ByHand(flat(weight_integers(model))), Watch(model)
    for runner.iter, batch in enumerate(batches(steps)):
        frozen = {name: layer.frozen.clone() for name, layer in hook._layers.items()}
        watch.seen.clear()
        model.train_step(batch, wrapper)
        for name, mask in frozen.items():
            first, second = (seen[f'{name}.weight'] for seen in watch.seen)
            assert torch.equal(first[mask], second[mask])  # no perturbation where there is no gradient
        assert not torch.equal(*(seen['branch.weight'] for seen in watch.seen))
        integers = flat(weight_integers(model))
        threshold = 0.02 + 0.13 * (1 + math.cos(math.pi * (runner.iter + 1) / steps)) / 2
        by_hand.add(integers, 0.2, threshold)
        hook.after_train_iter(runner, runner.iter)
        found = [layer.frozen for layer in hook._layers.values()]
        assert torch.cat([mask.flatten() for mask in found]).tolist() == [value is not None for value in by_hand.frozen]
        for number, integer in enumerate(flat(weight_integers(model))):
            assert by_hand.frozen[number] in (None, integer)
    share = np.mean([value is not None for value in by_hand.frozen])
    assert 0.05 < share < 0.9
    assert runner.message_hub.logged[FROZEN] == pytest.approx(share)
    assert runner.message_hub.logged[SCALAR] < 1 - share
    hook.after_train(runner)
    assert [
        value in (None, integer) for value, integer in zip(by_hand.frozen, flat(weight_integers(model)), strict=True)
    ]


@pytest.mark.parametrize('scale_gradients', ['plain', 'lsq'])
def test_gradients_are_those_of_scale_times_integer(scale_gradients: str) -> None:
    layer: Any = quantized('W4A4').branch
    quantizer = layer.weight_quant.tensor_quant.int_quant
    quantizer.lsq_counts = 'weights' if scale_gradients == 'lsq' else ''
    weights = layer.weight.detach().clone().requires_grad_(True)
    scale = layer.quant_weight().scale.detach().clone().requires_grad_(True)
    incoming = torch.randn_like(weights)
    mask = torch.rand_like(weights) > 0.5
    integers = torch.randint(-7, 8, weights.shape).float()
    bits, zero = torch.tensor(4.0), torch.tensor(0.0)

    def gradients(frozen: FrozenWeights | None, incoming: Tensor) -> list[Tensor]:
        quantizer.frozen = frozen
        output = quantizer(scale, zero, bits, weights)
        return [output.detach(), *torch.autograd.grad(output, [weights, scale], incoming)]

    output, of_weights, of_scale = gradients(FrozenWeights(mask, integers), incoming)
    free, free_weights, free_scale = gradients(None, incoming * ~mask)
    factor = 1.0
    if scale_gradients == 'lsq':
        factor = 7**2 / math.sqrt(weights.numel() // scale.numel() * 7)
    held = factor * (incoming * integers * mask).sum_to_size(scale.shape)
    assert torch.allclose(output, torch.where(mask, integers * scale, free).detach())
    assert torch.equal(of_weights, free_weights * ~mask)
    assert torch.allclose(of_scale, free_scale + held, rtol=1e-4, atol=1e-5)
    assert isinstance(quantizer, IntQuant)


def train(work_dir: Path, freeze: Any = FAST['freeze'], hooks: Any = (), **changes: Any) -> Runner:
    """Four epochs of five steps; a model of few bits under an optimizer that lets weights oscillate."""
    config = toy_config(work_dir, train_cfg=dict(by_epoch=True, max_epochs=4))
    config['train_dataloader']['dataset'] = dict(type='ResidualSamples', count=20)
    model = quantize(make(ResidualToy), QuantizationPolicy.from_config(policy('W2A4')))
    optimizer = dict(type='AdamW', lr=0.03, weight_decay=0.1)
    config.update(
        model=model,
        optim_wrapper=dict(type='SAMOptimWrapper', rho=0.05, optimizer=optimizer),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[*hooks, dict(type='OscillationHook', **{**FAST, 'freeze': freeze})],
    )
    runner = Runner(**{**config, **changes})
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize('averaged', [False, True])
def test_resumed_equals_never_stopped(averaged: bool, tmp_path: Path) -> None:
    hooks = [dict(type='EMAHook', momentum=0.1)] if averaged else []
    straight = train(tmp_path / 'straight', hooks=hooks)
    checkpoint = str(tmp_path / 'straight' / 'epoch_2.pth')
    resumed = train(tmp_path / 'resumed', hooks=hooks, resume=True, load_from=checkpoint)
    last = [torch.load(tmp_path / name / 'epoch_4.pth', weights_only=True) for name in ('straight', 'resumed')]
    for part in ('state_dict', *(['ema_state_dict'] if averaged else []), *last[0][STATE]):
        first, second = ((state if part in state else state[STATE])[part] for state in last)
        assert first.keys() == second.keys()
        assert all(same_bits(first[name], second[name]) for name in first)
    saved = torch.load(checkpoint, weights_only=True)[STATE]
    frozen = {name: layer['frozen'] for name, layer in saved.items()}
    assert sum(int(mask.sum()) for mask in frozen.values()) > 0
    # They hold to the end, and need no hook then: the weights themselves are scale * integer.
    read = quantize(make(ResidualToy), QuantizationPolicy.from_config(policy('W2A4')))
    straight.save_checkpoint(str(tmp_path), 'later.pth')
    read.load_state_dict(torch.load(tmp_path / 'later.pth', weights_only=True)['state_dict'])
    for model in (straight.model, resumed.model, read):
        for name, integers in weight_integers(model).items():
            expected = saved[name]['average'][frozen[name]]
            assert torch.equal(integers[frozen[name]].float(), expected)


def test_without_averages_in_the_checkpoint_a_warning_says_so(tmp_path: Path) -> None:
    train(tmp_path / 'measured', freeze=None)
    checkpoint = str(tmp_path / 'measured' / 'epoch_3.pth')
    assert STATE not in torch.load(checkpoint, weights_only=True)
    hook = OscillationHook(**FAST)
    runner = make_resuming(tmp_path / 'resumed')
    with record_warnings(runner) as lines:
        hook.after_load_checkpoint(runner, torch.load(checkpoint, weights_only=True))
    assert [line for line in lines if 'averages start anew' in line]


def make_resuming(work_dir: Path) -> Runner:
    return Runner(**toy_config(work_dir, resume=True))


@pytest.mark.parametrize('kind', ['zero points', 'statistics'])
def test_weights_that_cannot_be_frozen_are_refused(kind: str) -> None:
    runner = SimpleNamespace(model=quantized(kind))
    with pytest.raises(ValueError, match=r'OscillationHook: freeze=.* is not possible in conv.*weight_symmetric=True'):
        OscillationHook(freeze=0.02).before_train(runner)


def test_layers_of_more_bits_are_not_frozen() -> None:
    model = quantized('W8A8')
    OscillationHook(freeze=0.02).before_train(SimpleNamespace(model=model))
    assert model.branch.weight_quant.tensor_quant.int_quant.frozen is None


@pytest.mark.parametrize('freeze', [0, 1.5, (0.1,), (0.1, 0), True, 'all'])
def test_bad_thresholds(freeze: Any) -> None:
    with pytest.raises(
        ValueError, match=r'OscillationHook: freeze=.* is not allowed.*\(0, 1\].*freeze=\(0\.04, 0\.01\)'
    ):
        OscillationHook(freeze=freeze)
