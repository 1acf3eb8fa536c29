"""The wrapper inside MMEngine's Runner: every usual companion behaves as with the base optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from tests.references import sam_gradients
from tests.toys import ToyPair, batches, make, same_bits, same_state, toy_config
from tests.wrappers import WRAPPERS, build, momentum_sgd


def run(work_dir: Path, **changes: Any) -> Runner:
    runner = Runner.from_cfg(toy_config(work_dir, **changes))
    runner.train()
    return runner


def both(tmp_path: Path, optim: dict[str, Any] | None = None, **changes: Any) -> tuple[Runner, Runner]:
    """The same training with SAM at rho = 0 and with MMEngine's own wrapper."""
    optim = {'optimizer': dict(type='SGD', lr=0.01, momentum=0.9), **(optim or {})}
    changes.setdefault('custom_hooks', [])
    ours = run(
        tmp_path / 'ours', optim_wrapper=dict(type='SAMOptimWrapper', rho=0.0, **copy.deepcopy(optim)), **changes
    )
    base = run(tmp_path / 'base', optim_wrapper=dict(type='OptimWrapper', **copy.deepcopy(optim)), **changes)
    return ours, base


COMPANIONS: dict[str, dict[str, Any]] = {
    'plain': {},
    'EMAHook': dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)]),
    'ParamScheduler': dict(
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3),
            dict(type='MultiStepLR', milestones=[1], by_epoch=True),
            dict(type='MultiStepMomentum', milestones=[1], by_epoch=True),
        ]
    ),
    'paramwise_cfg': dict(
        optim=dict(
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys=dict(head=dict(lr_mult=0.5))),
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
        )
    ),
    'auto_scale_lr': dict(auto_scale_lr=dict(base_batch_size=16, enable=True)),
    'accumulative_counts': dict(optim=dict(accumulative_counts=3)),
    'clip_grad': dict(optim=dict(clip_grad=dict(max_norm=0.1, norm_type=2))),
    'clip_grad by value': dict(optim=dict(clip_grad=dict(type='value', clip_value=0.01))),
    'with_cp': dict(model=dict(type='ToyNet', with_cp=True)),
    'dropout': dict(model=dict(type='ToyNet', dropout=0.3)),
    'IterBasedTrainLoop': dict(train_cfg=dict(by_epoch=False, max_iters=7)),
}


@pytest.mark.parametrize('companion', COMPANIONS)
def test_at_rho_zero_everything_is_as_with_the_base_optimizer(tmp_path: Path, companion: str) -> None:
    ours, base = both(tmp_path, **COMPANIONS[companion])
    assert same_state(ours.model, base.model)
    assert ours.optim_wrapper.get_lr() == base.optim_wrapper.get_lr()
    assert ours.optim_wrapper.get_momentum() == base.optim_wrapper.get_momentum()
    logged = [sorted(r.message_hub.log_scalars) for r in (ours, base)]
    assert logged[0] == logged[1]
    for key in ('train/lr', 'train/loss'):
        histories = [r.message_hub.get_scalar(key).data[0].tolist() for r in (ours, base)]
        assert histories[0] == histories[1]


def test_the_companions_had_an_effect(tmp_path: Path) -> None:
    """Otherwise the comparison above would hold for companions that both sides ignore."""
    plain = run(tmp_path / 'plain')
    for number, name in enumerate(('ParamScheduler', 'paramwise_cfg', 'auto_scale_lr', 'accumulative_counts')):
        changes = copy.deepcopy(COMPANIONS[name])
        base = dict(type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
        changes['optim_wrapper'] = {**base, **changes.pop('optim', {})}
        assert not same_state(run(tmp_path / str(number), **changes).model, plain.model), name


def test_the_averaged_model_follows_the_restored_weights(tmp_path: Path) -> None:
    """With a learning rate of 0, an average of perturbed weights would differ from the initial ones."""
    runner = run(
        tmp_path / 'run',
        optim_wrapper=dict(type='SAMOptimWrapper', rho=0.5, optimizer=dict(type='SGD', lr=0.0)),
        custom_hooks=[dict(type='EMAHook', momentum=0.5)],
    )
    (hook,) = [h for h in runner.hooks if type(h).__name__ == 'EMAHook']
    averaged = hook.ema_model.module
    for name, parameter in runner.model.named_parameters():
        torch.testing.assert_close(averaged.get_parameter(name), parameter)


def test_members_of_an_optim_wrapper_dict() -> None:
    pair, expected = ToyPair(), ToyPair()
    wrapper = OptimWrapperDict(left=build('sam', pair.left), right=OptimWrapper(momentum_sgd(pair.right)))
    optimizers = {name: momentum_sgd(getattr(expected, name)) for name in ('left', 'right')}
    for batch in batches(3):
        pair.train_step(batch, wrapper)
        left = expected.left
        gradients = sam_gradients(left, lambda left=left, batch=batch: left.parse_losses(left(**batch))[0], 0.05)
        for parameter, gradient in zip(left.parameters(), gradients, strict=True):
            parameter.grad = gradient
        expected.right.parse_losses(expected.right(**batch))[0].backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert same_state(pair, expected)
    state = wrapper.state_dict()
    assert 'mm_sharp' in state['left']
    assert 'mm_sharp' not in state['right']
    wrapper.load_state_dict(state)


def test_a_forward_of_another_module_than_the_contexts_is_named() -> None:
    pair = ToyPair()
    wrapper = build('sam', pair)
    (batch,) = batches(1)
    with wrapper.optim_context(pair):
        losses = pair.right(**batch)
    with pytest.raises(RuntimeError, match='that was handed to optim_context'):
        wrapper.update_params(pair.right.parse_losses(losses)[0])


def test_gradients_of_parameters_that_the_optimizer_does_not_hold() -> None:
    """They get the second pass's gradient once, as they would get the only pass's with the base optimizer."""
    model = make(norm=False)
    wrapper = build('sam', model, momentum_sgd(model.head))
    reference = make(norm=False)
    (batch,) = batches(1)
    model.train_step(batch, wrapper)
    parameters = list(reference.head.parameters())
    loss = reference.parse_losses(reference(**batch))[0]
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(gradient * (0.05 / (norm + 1e-12)))
    reference.parse_losses(reference(**batch))[0].backward()
    for left, right in zip(model.conv.parameters(), reference.conv.parameters(), strict=True):
        assert same_bits(left.grad, right.grad)


@pytest.mark.parametrize('name', WRAPPERS)
def test_sync_batch_norm_buffers_are_kept_like_batch_norms(name: str) -> None:
    """SyncBN itself needs a GPU: in evaluation mode it runs on the CPU, and here its buffers are moved by hand."""
    model = make()
    model.norm = nn.SyncBatchNorm(6).eval()

    def move(module: nn.Module, *_: Any) -> None:
        module.num_batches_tracked += 1
        module.running_mean.mul_(0.9).add_(0.1)

    model.norm.register_forward_pre_hook(move)
    for batch in batches(3):
        model.train_step(batch, build(name, model))
    assert model.norm.num_batches_tracked.item() == 3
    torch.testing.assert_close(model.norm.running_mean, torch.full((6,), 1 - 0.9**3))


def test_a_frozen_part_stays(tmp_path: Path) -> None:
    model = make()
    model.conv.requires_grad_(False)
    before = make()
    wrapper = build('sam', model, momentum_sgd(model.head))
    for batch in batches(2):
        model.train_step(batch, wrapper)
    assert same_state(model.conv, before.conv)
    assert not same_state(model.head, before.head)
    assert [p.requires_grad for p in model.conv.parameters()] == [False, False]
