"""Where loss modules are found, by which names, and what happens when they are replaced in the middle of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.per_sample_loss import PerSampleLoss, PerSampleLossError, recorder
from mm_sharp.per_sample_loss.find import find_losses
from tests.checkpoints import through_disk
from tests.small_losses import Lambda, data, net, one_by_one, record
from tests.toys import Batch, ToyNet, make, same_state
from tests.toys import batches as toy_batches
from tests.wrappers import build


# -------------------------------------------------------------------- names
class LabelSmoothing(nn.Module):
    """A name without «loss»; a loss of torch's inside, which it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.divergence = nn.KLDivLoss(reduction='batchmean')

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - 0.9 * targets).square().mean()


class Derived(nn.MSELoss):
    """Derived from a loss of torch's, under another name."""


class DiceCriterion(LabelSmoothing):
    """Named in full."""


class Holder(nn.Module):
    """Not called by itself, though it could be."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Derived()

    def forward(self) -> None:
        """Never."""


NAMED: dict[str, tuple[str, nn.Module, Callable[[Any], Any]]] = {
    'criterion': ('criterion', LabelSmoothing(), lambda module: module),
    'in a list': ('criterions', nn.ModuleList([LabelSmoothing()]), lambda module: module[0]),
    'derived': ('smooth', Derived(), lambda module: module),
    'by class': ('dice', DiceCriterion(), lambda module: module),
    'a holder': ('criterion', Holder(), lambda module: module.part),
    'calls another': ('criterion', Lambda(lambda o, t: 2 * F.mse_loss(o, t)), lambda module: module),
}


@pytest.mark.parametrize('name', NAMED)
def test_losses_by_other_names(name: str) -> None:
    attribute, module, called = NAMED[name]
    model = net(lambda net, o, t: {'loss': called(getattr(net, attribute))(o, t)}, **{attribute: module})
    found, total = record(model, data())
    torch.testing.assert_close(found.losses(total), one_by_one(model, data()))
    assert len(found.terms) == 1


def test_a_criterion_that_calls_a_loss_counts_once() -> None:
    inner = nn.MSELoss()
    outer = Lambda(lambda output, targets: 3 * inner(output, targets))
    outer.inner = inner
    model = net(lambda net, o, t: {'loss': net.criterion(o, t)}, criterion=outer)
    found, total = record(model, data())
    torch.testing.assert_close(found.losses(total), one_by_one(model, data()))
    assert [term.name for term in found.terms] == ["Net's criterion (Lambda)"]


@pytest.mark.parametrize('seen', [False, True], ids=['none', 'another'])
def test_a_loss_by_no_such_name_is_told_the_rule(seen: bool) -> None:
    def total(net: Any, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        other = net.loss_fn(output, targets) if seen else 0.0
        return {'loss': net.smooth(output, targets) + other}

    found, loss = record(model := net(total, smooth=LabelSmoothing(), loss_fn=nn.MSELoss()), data())
    with pytest.raises(PerSampleLossError, match='"loss" or "criterion" in its name'):
        found.losses(loss)
    assert 'smooth' not in {loss.path for loss in find_losses(model)}


# -------------------------------------------------------------------- replaced in the middle
class Head(nn.Module):
    """Losses in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_module = nn.MSELoss()
        self.losses = nn.ModuleList([nn.L1Loss()])
        self.plain_losses: Any = [nn.HuberLoss()]
        self.named: Any = {'a': nn.SmoothL1Loss()}
        self.whole_loss = Lambda(lambda output, targets: self.whole_loss.inner(output, targets))
        self.whole_loss.inner = nn.MSELoss()

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        every = [self.loss_module, *self.losses, *self.plain_losses, *self.named.values(), self.whole_loss]
        every += [self.extra] if hasattr(self, 'extra') else []
        return sum(loss(output, targets) for loss in every)


class Empty(nn.Module):
    """Has no children."""

    def forward(self, output: Tensor, targets: Tensor) -> Any:
        return self.late_loss(output, targets) if hasattr(self, 'late_loss') else 0.0


class Deep(BaseModel):
    """A head within a container, and a module that has no loss yet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.heads = nn.ModuleList([Head()])
        self.empty = Empty()

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        output = self.linear(inputs)
        return {'loss': self.heads[0](output, targets) + self.empty(output, targets)}


def total_of(reduction: str) -> nn.Module:
    return Lambda(lambda o, t: ((o - t).abs() ** 1.5).sum() / (len(o) if reduction == 'mean' else 1))


SWITCHES: dict[str, Callable[[Deep], Any]] = {
    'attribute': lambda model: setattr(model.heads[0], 'loss_module', total_of('mean')),
    'sum for mean': lambda model: setattr(model.heads[0], 'loss_module', total_of('sum')),
    'in a module list': lambda model: model.heads[0].losses.__setitem__(0, nn.HuberLoss()),
    'added to a module list': lambda model: model.heads[0].losses.append(nn.HuberLoss()),
    'taken out': lambda model: model.heads[0].losses.__delitem__(0),
    'within a loss': lambda model: setattr(model.heads[0].whole_loss, 'inner', total_of('sum')),
    'added': lambda model: setattr(model.heads[0], 'extra', nn.L1Loss(reduction='sum')),
    'added below': lambda model: setattr(model.empty, 'late_loss', nn.L1Loss()),
    'the head': lambda model: model.heads.__setitem__(0, Head()),
}


@pytest.mark.parametrize('name', SWITCHES)
def test_a_replaced_loss_is_found(name: str) -> None:
    torch.manual_seed(0)
    model = Deep()
    per_sample = PerSampleLoss(model)
    for number in range(4):
        if number == 2:
            SWITCHES[name](model)
        with per_sample.record() as found:
            total = model(**data(seed=number))['loss']
        torch.testing.assert_close(found.losses(total), one_by_one(model, data(seed=number)))


def test_a_model_is_not_searched_again_while_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[nn.Module] = []
    find = recorder.find_losses
    monkeypatch.setattr(recorder, 'find_losses', lambda model: searches.append(model) or find(model))
    model = Deep()
    per_sample = PerSampleLoss(model)
    assert not per_sample.look_again()
    for number in range(3):
        with per_sample.record():
            model(**data(seed=number))
    assert len(searches) == 1
    model.other = nn.Linear(2, 2)
    assert per_sample.look_again()
    model.heads[0].loss_module = nn.L1Loss()
    assert per_sample.look_again()
    assert len(searches) == 3


SWITCHED = {'esam': {}, 'esam-history': {'refresh': 2}, 'ausam': {}, 'ausam-reweight': {}}


@pytest.mark.parametrize('after', ['mean', 'sum'])
@pytest.mark.parametrize('name', SWITCHED)
def test_training_goes_on_with_the_new_loss(name: str, after: str) -> None:
    """As a wrapper does that has seen no other loss. (With the history, the step of the switch measures nothing.)"""

    def switch(model: nn.Module) -> None:
        model.square_loss = nn.L1Loss(reduction=after)

    torch.manual_seed(0)
    model = make(Switched)
    wrapper = build(name, model, **SWITCHED[name])
    batches: list[Batch] = toy_batches(3) * 2
    for batch in batches[:3]:
        model.train_step(batch, wrapper)
    fresh = make(Switched)
    fresh.load_state_dict(model.state_dict())
    state = through_disk(wrapper.state_dict())
    for each in (model, fresh):
        switch(each)
    for batch in batches[3:]:
        model.train_step(batch, wrapper)
    other = build(name, fresh, **SWITCHED[name])
    other.load_state_dict(state)
    for batch in batches[3:]:
        fresh.train_step(batch, other)
    assert same_state(model, fresh)


class Switched(ToyNet):
    """One loss."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        return {'loss': self.square_loss(super().forward(inputs, targets, sample_idx, 'tensor'), targets)}
