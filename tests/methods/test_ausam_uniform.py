"""The uniform draw as a method of its own: no scores, no losses of samples, sums as long as on the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp import AUSAMOptimWrapper, SAMOptimWrapper
from mm_sharp.per_sample_loss import PerSampleLossError, Reduction
from tests.toys import Functional, Notes, ToyNet, batches, make, same_state, toy_config
from tests.wrappers import momentum_sgd


class Sums(ToyNet):
    """A sum over the batch by a function, a mean by a module, a list of both, and a count over the batch."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        output = super().forward(inputs, targets, mode='tensor')
        return {
            'loss_sum': 0.01 * F.mse_loss(output, targets, reduction='sum'),
            'loss_mean': self.square_loss(output, targets),
            'loss_list': [0.01 * output.square().sum(), output.abs().mean()],
            'loss_count': output.abs().sum() / (targets > 0).sum(),
            'acc': output.detach().mean(),
        }


class Late(ToyNet):
    """One of its losses is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[Any] = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.forwards.append(len(inputs))
        output = super().forward(inputs, targets, mode='tensor')
        late = output.square().sum() * (0.0 if len(self.forwards) < 6 else 0.01)
        return {'loss': self.square_loss(output, targets), 'loss_late': late}


class YOLOXPoseHead(nn.Module):
    """By its name a head whose losses are of anchors, not of samples."""


class WithoutSampleLosses(ToyNet):
    def __init__(self) -> None:
        super().__init__()
        self.yolo = YOLOXPoseHead()


def uniform(model: nn.Module, **options: Any) -> AUSAMOptimWrapper:
    return AUSAMOptimWrapper(momentum_sgd(model, 0.01), draw='uniform', **options)


def scaled(losses: dict[str, Any], factor: float) -> Tensor:
    sums, rest = losses['loss_sum'] + losses['loss_list'][0], losses['loss_mean'] + losses['loss_count']
    return factor * sums + rest + losses['loss_list'][1]


@pytest.mark.parametrize('ratio', [0.5, 0.3])
def test_steps_are_sams_on_the_samples_drawn_with_sums_scaled(ratio: float) -> None:
    """From the first step on, though which losses are sums has to be found out."""
    ours, theirs = make(Sums), make(Sums)
    wrapper = uniform(ours, sampling_ratio=ratio)
    optimizer = momentum_sgd(theirs, 0.01)
    for batch in batches(6):
        ours.train_step(batch, wrapper)
        rows = wrapper._draw.chosen
        part = {name: value[rows] for name, value in batch.items()}
        factor, parameters = 8 / len(rows), list(theirs.parameters())
        gradients = torch.autograd.grad(scaled(theirs(**part), factor), parameters)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        before = {name: value.clone() for name, value in theirs.state_dict().items()}
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=0.05 / (float(norm) + 1e-12))
        final = torch.autograd.grad(scaled(theirs(**part), factor), parameters)
        theirs.load_state_dict(before)
        for p, g in zip(parameters, final, strict=True):
            p.grad = g
        optimizer.step()
        for left, right in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    found = wrapper.state_dict()['mm_sharp']['reductions']
    assert found == {
        'loss_sum': 'sum', 'loss_mean': 'mean', 'loss_list.0': 'sum', 'loss_list.1': 'mean', 'loss_count': 'mean'
    }  # fmt: skip


@pytest.mark.parametrize('kind', [ToyNet, Functional, WithoutSampleLosses])
def test_models_whose_losses_are_means_take_sams_steps_bit_for_bit(kind: type[ToyNet]) -> None:
    """Also those without losses of samples, and whose samples have no id."""
    ours, theirs = make(kind), make(kind)
    wrapper, sam = uniform(ours), SAMOptimWrapper(momentum_sgd(theirs, 0.01))
    for batch in batches(4):
        del batch['sample_idx']
        ours.train_step(batch, wrapper)
        theirs.train_step({name: value[wrapper._draw.chosen] for name, value in batch.items()}, sam)
        assert same_state(ours, theirs)
    assert len(wrapper.history) == 0
    if kind is not ToyNet:
        with pytest.raises(PerSampleLossError):
            ours.train_step(batches(1)[0], AUSAMOptimWrapper(momentum_sgd(ours)))


def test_no_loss_module_is_hooked() -> None:
    seen: list[int] = []

    class Watch(ToyNet):
        def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
            seen.append(len(self.square_loss._forward_hooks) + len(self.square_loss._forward_pre_hooks))
            return super().forward(inputs, targets, sample_idx, mode)

    model = make(Watch)
    wrapper = uniform(model)
    for batch in batches(2):
        model.train_step(batch, wrapper)
    assert seen == [0] * 5


def test_dropout_draws_what_it_would_without_the_trial() -> None:
    ours, theirs = make(dropout=0.5), make(dropout=0.5)
    wrapper, sam = uniform(ours), SAMOptimWrapper(momentum_sgd(theirs, 0.01))
    (batch,) = batches(1)
    states = []
    for model, w in ((ours, wrapper), (theirs, sam)):
        torch.manual_seed(3)
        rows = slice(None) if w is wrapper else wrapper._draw.chosen
        model.train_step({name: value[rows] for name, value in batch.items()}, w)
        states.append(torch.get_rng_state())
    assert same_state(ours, theirs)
    assert torch.equal(*states)


def test_a_loss_that_shows_nothing_is_tried_again() -> None:
    model = make(Late)
    wrapper = uniform(model)
    for batch in batches(8):
        model.train_step(batch, wrapper)
    assert wrapper._scale.reductions == {'loss': Reduction.MEAN, 'loss_late': Reduction.SUM}
    assert model.forwards.count(8) == 3  # steps 1, 2, and 4, in which it showed


def test_a_resumed_run_tries_nothing_again() -> None:
    model, twin = make(Sums), make(Sums)
    wrapper = uniform(model)
    first, second = batches(2)
    model.train_step(first, wrapper)
    state, weights = copy.deepcopy((wrapper.state_dict(), model.state_dict()))
    model.train_step(second, wrapper)
    other = uniform(twin)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    assert not other._scale.is_to_try(torch.device('cpu'))
    twin.train_step(second, other)
    assert same_state(model, twin)


def test_models_that_return_a_tensor() -> None:
    class Rows(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, inputs: Tensor, mode: str = 'loss') -> Tensor:
            return self.layer(inputs).square().sum()

    torch.manual_seed(0)
    model = Rows()
    wrapper = uniform(model)
    with wrapper.optim_context(model):
        loss = model(torch.ones(8, 3))
    assert loss.item() == pytest.approx(8 * model.layer(torch.ones(1, 3)).square().item())
    wrapper.update_params(loss)
    assert wrapper._scale.reductions == {'': Reduction.SUM}


@pytest.mark.parametrize('in_loader', [False, True])
def test_in_a_runner(tmp_path: Path, in_loader: bool) -> None:
    config = toy_config(
        tmp_path, optim_wrapper=dict(type='AUSAMOptimWrapper', draw='uniform', optimizer=dict(type='SGD', lr=0.01))
    )
    if in_loader:
        config['train_dataloader']['batch_sampler'] = dict(type='AUSAMSampler')
    runner = Runner.from_cfg(config)
    runner.train()
    assert len(runner.optim_wrapper._draw.chosen) == 2
    assert len(runner.optim_wrapper.history) == 0
    assert 'train/sharpness/share_seen' not in runner.message_hub.log_scalars
