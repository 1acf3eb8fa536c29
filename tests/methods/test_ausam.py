"""AUSAM as a user meets it: every kind of model and batch, arguments, figures for the log."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mm_sharp import AUSAMOptimWrapper, SAMOptimWrapper
from tests.references_ausam import ReferenceAUSAM, inclusion_probabilities, mean_sizes, mean_squares, terms
from tests.toys import Notes, batches, make, same_state
from tests.wrappers import constant_ausam, momentum_sgd

NAN = math.nan


# -------------------------------------------------------------------- models and batches of every kind
class Listener(BaseModel):
    """A linear regressor on the averages of pictures; notes the ids of the samples in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.loss_module = nn.MSELoss()
        self.seen: list[list[int]] = Notes()

    def losses(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {'loss': self.loss_module(self.layer(features), targets)}


class PoseModel(Listener):
    """Takes data samples, with one tensor of pictures or with a list of pictures of different sizes."""

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'loss') -> Any:
        self.seen.append([sample.id for sample in data_samples])
        features = torch.stack([picture.mean((1, 2)) for picture in inputs])
        return self.losses(features, torch.stack([sample.target for sample in data_samples]))


class TwoCameras(Listener):
    """Takes a dict of inputs within a dict."""

    def forward(self, inputs: Any, targets: Any, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.seen.append(sample_idx.tolist())
        features = inputs['near'].mean((2, 3)) + inputs['others']['far'].mean((2, 3))
        return self.losses(features, targets['position'][0])


class Rows(Listener):
    """Returns a loss of shape (N,)."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.seen.append(sample_idx.tolist())
        return {'loss': (self.layer(inputs.mean((2, 3))) - targets).square().mean(1)}


class RowsAndMore(Rows):
    """Returns a loss of shape (N,), and one of a loss module."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        return {'loss_rows': losses['loss'], **self.losses(inputs.mean((2, 3)), targets)}


def pose_samples(count: int) -> list[BaseDataElement]:
    generator = torch.Generator().manual_seed(6)
    targets = torch.randn(count, 2, generator=generator)
    return [
        BaseDataElement(metainfo=dict(id=100 + i, img_id=i // 2, dataset_name='poses'), target=targets[i])
        for i in range(count)
    ]


def data_of(kind: str, count: int) -> dict[str, Any]:
    """A batch, as ``train_step`` takes it."""
    generator = torch.Generator().manual_seed(7)
    pictures, far = (torch.randn(count, 3, 5, 5, generator=generator) for _ in range(2))
    targets, ids = torch.randn(count, 2, generator=generator), torch.arange(count) + 100
    if kind == 'stacked':
        return dict(inputs=pictures, data_samples=pose_samples(count))
    if kind == 'list':
        different = [picture[:, : 2 + i % 3] for i, picture in enumerate(pictures)]
        return dict(inputs=different, data_samples=pose_samples(count))
    if kind == 'nested':
        inputs = {'near': pictures, 'others': {'far': far}}
        return dict(inputs=inputs, targets={'position': (targets, [])}, sample_idx=ids)
    return dict(inputs=pictures, targets=targets, sample_idx=ids)


def taken(value: Any, rows: list[int]) -> Any:
    """The samples ``rows`` of a batch of :func:`data_of`."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {name: taken(item, rows) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(taken(item, rows) for item in value)
    return [value[row] for row in rows] if value else value


MODELS = {'stacked': PoseModel, 'list': PoseModel, 'nested': TwoCameras, 'rows': Rows, 'rows and more': RowsAndMore}


@pytest.mark.parametrize('count', [3, 8])  # 3, as many samples as pictures have channels
@pytest.mark.parametrize('kind', MODELS)
def test_both_passes_run_on_the_samples_drawn_and_nothing_else(kind: str, count: int) -> None:
    """The steps are SAM's on the samples drawn; the history has their ids."""
    ours, theirs = make(MODELS[kind]), make(MODELS[kind])
    wrapper, sam = constant_ausam(momentum_sgd(ours)), SAMOptimWrapper(momentum_sgd(theirs))
    data, expected = data_of(kind, count), set()
    for _ in range(6):
        ours.seen.clear()
        ours.train_step(data, wrapper)
        rows = wrapper._draw.chosen.tolist()
        assert len(rows) == math.ceil(0.6 * count)
        assert ours.seen == [[100 + row for row in rows]] * 2
        theirs.train_step(taken(data, rows), sam)
        assert same_state(ours, theirs)
        expected |= set(rows)
    wrapper.exchange_history()
    name = 'poses' if kind in ('stacked', 'list') else ''
    assert set(np.flatnonzero(~np.isnan(wrapper.history.scores([(name, 100 + i) for i in range(count)])))) == expected
    assert len(wrapper.history) == len(expected)


@pytest.mark.parametrize('reweight', [False, True])
@pytest.mark.parametrize(
    'kind',
    [
        'stacked',
        'list',
        'nested',
        'rows',
        'rows and more',
    ],
)
def test_one_sample_of_a_batch(kind: str, reweight: bool) -> None:
    model = make(MODELS[kind])
    wrapper = constant_ausam(momentum_sgd(model), sampling_ratio=0.1, reweight=reweight)
    for _ in range(4):
        model.train_step(data_of(kind, 8), wrapper)
        assert len(model.seen[-1]) == 1
    wrapper.exchange_history()
    assert len(wrapper.history) == len({*map(tuple, model.seen)})


# -------------------------------------------------------------------- arguments
BAD: dict[str, tuple[Any, ...]] = {
    'sampling_ratio': (0, -0.1, 1.1, NAN, math.inf, '0.5', None, True, [0.5]),
    's_min': (0, -1, NAN, math.inf, 'a', None, True),
    's_max': (0.2, -1, NAN, math.inf, 'a', None, True),
    'reweight': (1, 0, 'yes', None),
    'prefer': ('larger', 'Small', None, True, 1),
    'clip_quantile': (0, -0.1, 1.1, NAN, math.inf, '0.9', None, True),
    'history_momentum': (-0.1, 1.0, 1.5, NAN, 'a', True),
}


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_named_and_corrected(name: str, value: Any) -> None:
    optimizer = momentum_sgd(make())
    with pytest.raises(
        ValueError, match=rf'^AUSAMOptimWrapper: {name}={re.escape(repr(value))} is not allowed'
    ) as error:
        AUSAMOptimWrapper(optimizer, **{name: value})
    corrected = re.search(rf"optim_wrapper = dict\(type='AUSAMOptimWrapper', {name}=(.+), \.\.\.\)", str(error.value))
    assert corrected is not None
    AUSAMOptimWrapper(optimizer, **{name: eval(corrected[1])})


def test_s_max_below_s_min() -> None:
    optimizer = momentum_sgd(make())
    with pytest.raises(
        ValueError, match=r's_max=1.0 is not allowed: it must be a finite number in \[2.5, inf\)'
    ) as error:
        AUSAMOptimWrapper(optimizer, s_min=2.5)
    assert 's_max=2.5, ...)' in str(error.value)
    AUSAMOptimWrapper(optimizer, s_min=2.5, s_max=2.5)


@pytest.mark.parametrize(
    'options',
    [
        dict(sampling_ratio=1),
        dict(sampling_ratio=1e-300),
        dict(sampling_ratio=np.float64(0.5)),
        dict(s_min=1, s_max=1),
        dict(s_min=1e-300, s_max=1e300),
        dict(clip_quantile=1e-300, prefer='small'),
        dict(clip_quantile=1),
        dict(history_momentum=0),
        dict(history_momentum=0.999),
    ],
    ids=str,
)
def test_arguments_at_the_ends_of_their_ranges(options: dict[str, Any]) -> None:
    model = make()
    wrapper = constant_ausam(momentum_sgd(model), **options)
    for batch in batches(1) * 4:
        model.train_step(batch, wrapper)
        assert wrapper._draw.pi.sum() == pytest.approx(len(wrapper._draw.chosen), rel=1e-12)
    wrapper.exchange_history()
    assert 0 < len(wrapper.history) <= 8


# -------------------------------------------------------------------- figures for the log
def test_figures_of_a_step_worked_by_hand() -> None:
    model, twin = make(), make()
    wrapper = constant_ausam(momentum_sgd(model))
    scores = [0.1, 0.1, 0.3, 0.6, 0.7, 0.35, None, None]
    wrapper.history.update([('', i) for i in range(6)], [s for s in scores if s is not None])
    (batch,) = batches(1)
    model.train_step(batch, wrapper)
    rows = wrapper._draw.chosen.tolist()
    reference = ReferenceAUSAM(twin, momentum_sgd(twin), terms(mean_squares, mean_sizes))
    _, differences = reference._passes(batch['inputs'][rows], batch['targets'][rows], None, 8)
    shares = [p / 5 for p in inclusion_probabilities(scores, 5, 0.3, 1.0)]
    assert wrapper.last_step.metrics() == {
        'mean_difference': pytest.approx(sum(differences) / 5, rel=1e-5),
        'sampling_entropy': pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(8), rel=1e-6),
        'large_scores': 4 / 8,  # 0.6 and 0.7, above the middle 0.4, and the two never seen
    }
    assert 0.9 < wrapper.last_step.metrics()['sampling_entropy'] < 1


def test_figures_where_nothing_is_known() -> None:
    model = make()
    wrapper = constant_ausam(momentum_sgd(model))
    model.train_step(batches(1)[0], wrapper)
    figures = wrapper.last_step.metrics()
    assert figures['sampling_entropy'] == pytest.approx(1.0, abs=1e-12)
    assert figures['large_scores'] == 1.0
    assert math.isfinite(figures['mean_difference'])


def test_figures_stay_those_of_their_step() -> None:
    model = make()
    wrapper = constant_ausam(momentum_sgd(model))
    records = []
    for batch in batches(1) * 3:
        model.train_step(batch, wrapper)
        records.append((wrapper.last_step, wrapper.last_step.metrics()))
    for record, figures in records:
        assert record.metrics() == figures
    assert len({tuple(figures.values()) for _, figures in records}) == 3


def test_the_share_of_samples_seen() -> None:
    model = make()
    wrapper = constant_ausam(momentum_sgd(model))
    first, second = batches(2)
    assert wrapper.log_scalars() == {}  # the size of the data set is not known
    wrapper.dataset_size = 40
    model.train_step(first, wrapper)
    assert wrapper.log_scalars() == {'share_seen': 0.0}  # written when the next step begins
    model.train_step(second, wrapper)
    assert wrapper.log_scalars() == {'share_seen': 5 / 40}
    wrapper.exchange_history()
    assert wrapper.log_scalars() == {'share_seen': 10 / 40}
