"""Batches so small that ESAM and AUSAM would leave one sample, with layers that normalise over the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from mm_sharp.errors import UserError
from mm_sharp.samples.draw import BatchDrawer
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.schedule import Schedule
from mm_sharp.samples.seeds import RngStream, make_generator
from mm_sharp.samples.selection import sample_count
from mm_sharp.samples.subset import fewest_samples
from tests.toys import Batch, Notes, ToyNet, batches, make, same_state, toy_config
from tests.wrappers import build, same_weights

METHODS: dict[str, dict[str, Any]] = {
    'esam': {'gamma': 0.5, 'beta': 1.0},
    'esam-history': {'gamma': 0.5, 'beta': 1.0},
    'ausam': {'sampling_ratio': 0.5},
    'ausam-reweight': {'sampling_ratio': 0.5},
}
every_method = pytest.mark.parametrize('name', METHODS)


@MODELS.register_module()
class RowNet(ToyNet):
    """Normalises (N, C), or, with ``pooled``, maps of one pixel; notes how many samples come."""

    def __init__(self, pooled: bool = False, lazy: bool = False) -> None:
        super().__init__(norm=False)
        self.rows_norm = nn.BatchNorm2d(96) if pooled else nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(96)
        self.pooled, self.sizes = pooled, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.sizes.append(len(inputs))
        rows = self.features(inputs).flatten(1)
        output = self.head(self.rows_norm(rows[..., None, None] if self.pooled else rows).flatten(1))
        return {'loss_square': self.square_loss(output, targets), 'loss_size': self.size_loss(output)}


def of_size(size: int) -> Batch:
    return {key: value[:size] for key, value in batches(1)[0].items()}


@every_method
def test_a_last_batch_of_two_is_kept_whole(name: str) -> None:
    """Its step is SAM's."""
    ours, theirs = make(RowNet), make(RowNet)
    wrapper, sam = build(name, ours, **METHODS[name]), build('sam', theirs)
    ours.train_step(of_size(8), wrapper)
    theirs.load_state_dict(ours.state_dict())
    sam.optimizer.load_state_dict(copy.deepcopy(wrapper.optimizer.state_dict()))
    ours.train_step(of_size(2), wrapper)
    theirs.train_step(of_size(2), sam)
    assert same_weights(name, ours, theirs)
    assert ours.sizes[-1] == 2


@every_method
@pytest.mark.parametrize('size', [3, 8])
def test_of_more_as_many_are_kept_as_ever_but_two_at_least(name: str, size: int) -> None:
    ratio = 'gamma' if name.startswith('esam') else 'sampling_ratio'
    for value, kept in ((0.1, 2), (0.5, -(-size // 2))):
        model = make(RowNet)
        model.train_step(of_size(size), build(name, model, **{**METHODS[name], ratio: value}))
        assert model.sizes[-1] == kept


@every_method
def test_models_that_can_train_on_one_sample_do(name: str) -> None:
    model = make()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs['inputs'])), with_kwargs=True)
    model.train_step(of_size(2), build(name, model, **METHODS[name]))
    assert sizes[-1] == 1


@every_method
def test_where_it_cannot_be_told_the_error_names_the_way_out(name: str) -> None:
    model, twin = make(RowNet, pooled=True), make(RowNet, pooled=True)
    ratio = 'gamma' if name.startswith('esam') else 'sampling_ratio'
    with pytest.raises(UserError, match=rf'1 of the 2 samples.*drop_last=True.*, {ratio}=1.0') as caught:
        model.train_step(of_size(2), build(name, model, **METHODS[name]))
    assert '\n' not in str(caught.value)
    assert same_state(model, twin)


@every_method
def test_a_batch_of_one_is_torchs_to_refuse(name: str) -> None:
    """The base optimizer cannot train on it either."""
    model = make(RowNet)
    with pytest.raises(ValueError, match='more than 1 value per channel') as caught:
        model.train_step(of_size(1), build(name, model, **METHODS[name]))
    assert 'drop_last' not in str(caught.value)


@pytest.mark.parametrize(
    ('model', 'expected'), [(ToyNet(), 1), (RowNet(), 2), (RowNet(lazy=True), 2), (RowNet(pooled=True), 1)]
)
def test_which_models_need_two(model: nn.Module, expected: int) -> None:
    assert fewest_samples(model) == expected


@pytest.mark.parametrize(('ratio', 'total', 'kept'), [(0.5, 1, 1), (0.5, 2, 2), (0.1, 9, 2), (0.5, 9, 5), (1.0, 3, 3)])
def test_the_count_with_two_at_least(ratio: float, total: int, kept: int) -> None:
    assert sample_count(ratio, total, 2) == kept


def test_probabilities_stay_exact() -> None:
    history = SampleHistory()
    keys = [('toys', number) for number in range(5)]
    history.update(keys, [0.0, 0.1, 0.4, 0.9, 1.0])
    drawer = BatchDrawer(history, Schedule(0.2, 0.3, 1.0))
    drawer.fewest = 2
    counts, draws = np.zeros(5), 1000
    for step in range(draws):
        draw = drawer.draw(keys, make_generator(0, RngStream.SAMPLES, 0, step))
        counts[draw.chosen] += 1
    assert draw.pi.sum() == pytest.approx(2, rel=1e-12)
    assert (np.abs(counts / draws - draw.pi) <= 4 * np.sqrt(draw.pi * (1 - draw.pi) / draws)).all()


def test_the_data_loader_draws_as_many(tmp_path: Path) -> None:
    """10 samples in batches of 4: of the last two, both are loaded in the first epoch already."""
    wrapper = dict(
        type='AUSAMOptimWrapper', sampling_ratio=0.25, schedule='constant', optimizer=dict(type='SGD', lr=0.01)
    )
    config = toy_config(tmp_path / 'run', model=dict(type='RowNet'), optim_wrapper=wrapper)
    config['train_dataloader'].update(
        dataset=dict(type='ToySamples', count=10), batch_sampler=dict(type='AUSAMSampler')
    )
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.model.sizes == [2] * 12  # 3 batches, 2 passes, 2 epochs
