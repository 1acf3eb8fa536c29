"""What was recorded is compared with what the model returned in every step, weighted or not; nothing slips through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.per_sample_loss import PerSampleLoss, PerSampleLossError
from tests.small_losses import HostReads
from tests.toys import Batch, Notes, same_state
from tests.wrappers import build

N = 6
WEIGHTS = [None, torch.full((N,), 1 / N), torch.rand(N, generator=torch.Generator().manual_seed(0))]
weighted = pytest.mark.parametrize('weights', WEIGHTS, ids=['plain', 'equal', 'weighted'])


class Made(nn.Module):
    """A loss made of a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Net(BaseModel):
    """Two classes at each of 4 pixels; from the forward ``ignoring_from`` on, each sample ignores as many as its id."""

    def __init__(self, loss: nn.Module, ignoring_from: int = 10**9) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.loss_fn, self.ignoring_from, self.forwards = loss, ignoring_from, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        if len(self.forwards) >= self.ignoring_from:
            targets = targets.where(torch.arange(4) >= (sample_idx % 4)[:, None], 255)
        self.forwards.append(None)  # a list: wrappers take numbers back
        return {'loss': self.loss_fn(self.linear(inputs).view(-1, 2, 4), targets)}


def ignoring(number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(N, 8, generator=generator)
    return {'inputs': inputs, 'targets': (inputs[:, :4] > 0).long(), 'sample_idx': torch.arange(N)}


def net(loss: nn.Module, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(loss, **kwargs)


def contrast(output: Tensor, _: Tensor) -> Tensor:
    """Of a sample alone it is 0."""
    rows = F.normalize(output.flatten(1), dim=1)
    return F.cross_entropy(rows @ rows.T / 0.1, torch.arange(len(rows)).roll(1) % len(rows))


def zero_where_all_is_ignored(output: Tensor, targets: Tensor) -> Tensor:
    targets = targets.where((targets[:, 3] == 1)[:, None], 255)
    return F.cross_entropy(output, targets, ignore_index=255, reduction='sum') / (targets != 255).sum().clamp(min=1)


def nan_where_all_is_ignored(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets.where((targets[:, 3] == 1)[:, None], 255), ignore_index=255)


@weighted
@pytest.mark.parametrize('loss', [contrast, zero_where_all_is_ignored, nan_where_all_is_ignored])
def test_a_loss_that_is_no_mean_of_its_samples_is_refused(loss: Any, weights: Tensor | None) -> None:
    def losses() -> None:
        model = net(Made(loss))
        with PerSampleLoss(model).record(weights=weights) as record:
            output = model(**ignoring())
        record.losses(output['loss'])

    with pytest.raises(PerSampleLossError, match=r"Net's loss_fn \(Made\).*neither"):
        losses()


@weighted
def test_a_loss_that_is_a_mean_in_its_first_batch_only(weights: Tensor | None) -> None:
    model = net(nn.CrossEntropyLoss(ignore_index=255), ignoring_from=2)
    per_sample = PerSampleLoss(model)
    for number in range(3):
        with per_sample.record(weights=weights) as record:
            total = model(**ignoring(number))['loss']
        if number < 2:
            record.losses(total)
    with pytest.raises(PerSampleLossError, match=r"Net's loss_fn \(CrossEntropyLoss\).*neither the sum nor the mean"):
        record.losses(total)


@weighted
def test_sums_and_overflows_pass(weights: Tensor | None) -> None:
    per_sample = PerSampleLoss(model := net(nn.CrossEntropyLoss(reduction='sum')))
    for value in (1.0, torch.inf):
        batch = ignoring()
        batch['inputs'][2] *= value
        with per_sample.record(weights=weights) as record:
            total = model(**batch)['loss']
        assert record.losses(total).isfinite().tolist() == [row != 2 or value == 1.0 for row in range(N)]


@pytest.mark.parametrize('name', ['ausam', 'ausam-reweight'])
def test_a_step_that_is_refused_leaves_nothing(name: str) -> None:
    model, twin = (net(nn.CrossEntropyLoss(ignore_index=255), ignoring_from=4) for _ in range(2))
    wrapper, other = (build(name, m, sampling_ratio=1.0) for m in (model, twin))
    for number in range(2):
        model.train_step(ignoring(number), wrapper)
        twin.train_step(ignoring(number), other)
    with pytest.raises(PerSampleLossError, match='neither'):
        model.train_step(ignoring(2), wrapper)
    assert same_state(model, twin)
    assert wrapper.steps == 2


# -------------------------------------------------------------------- an accelerator, which the host does not wait for
@pytest.fixture
def device_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mm_sharp.per_sample_loss.recorder.host_waits', lambda device: True)


@pytest.mark.usefixtures('device_is_far')
@pytest.mark.parametrize(
    ('name', 'options', 'forwards'),
    [
        ('ausam', {'sampling_ratio': 1.0}, 2),
        ('ausam-reweight', {'sampling_ratio': 1.0}, 2),
        ('esam', {}, 3),
        ('esam-history', {'refresh': 2}, 2.5),
    ],
)
def test_it_is_reported_one_step_later(name: str, options: dict[str, Any], forwards: float) -> None:
    """The step after the wrong one is refused, wherever it is told, and undone."""
    model = net(nn.CrossEntropyLoss(ignore_index=255), ignoring_from=int(2 * forwards))
    wrapper = build(name, model, **options)
    for number in range(3):
        model.train_step(ignoring(number), wrapper)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PerSampleLossError, match=r'loss_fn \(CrossEntropyLoss\).*neither'):
        model.train_step(ignoring(3), wrapper)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert wrapper.steps == 3


@pytest.mark.usefixtures('device_is_far')
@weighted
def test_the_host_does_not_wait_for_the_comparison(weights: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    per_sample = PerSampleLoss(model := net(nn.CrossEntropyLoss()))
    lists: list[Tensor] = []  # on the CPU tolist() reads memory without any operation
    for number in range(3):
        if number == 1:  # the first comparison may wait
            monkeypatch.setattr(Tensor, 'tolist', lambda tensor: lists.append(tensor))
        with HostReads() as reads, per_sample.record(weights=weights) as record:
            total = model(**ignoring(number))['loss']
        with HostReads() as later:
            record.losses(total)
        assert number == 0 or reads.count == later.count == len(lists) == 0
    per_sample.flush()


@pytest.mark.usefixtures('device_is_far')
def test_a_comparison_under_way_outlives_a_new_loss() -> None:
    per_sample = PerSampleLoss(model := net(nn.CrossEntropyLoss(ignore_index=255), ignoring_from=1))
    for number in range(2):
        with per_sample.record() as record:
            total = model(**ignoring(number))['loss']
        record.losses(total)
    model.loss_fn = nn.CrossEntropyLoss(reduction='sum', ignore_index=255)
    with per_sample.record() as record:
        total = model(**ignoring(2))['loss']
    with pytest.raises(PerSampleLossError, match='neither'):
        per_sample.flush()
    record.losses(total)
