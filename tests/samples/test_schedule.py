"""The schedule of AUSAM's draws: which one arguments ask for, what it is in each place, how long a training is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset

from mm_sharp import AUSAMOptimWrapper, AUSAMSampler
from mm_sharp.hooks.history import training_length
from mm_sharp.hooks.start import in_words
from mm_sharp.samples.schedule import AFTER_RAMP, SCHEDULES, TrainingLength, Unset, schedule_of
from mm_sharp.step.method import Cost
from tests.toys import make
from tests.wrappers import momentum_sgd

AUTHORS, CONSTANT = SCHEDULES['authors'], SCHEDULES['constant']


def built(**options: Any) -> Any:
    return AUSAMOptimWrapper(momentum_sgd(make()), **options).drawer.schedule


# -------------------------------------------------------------------- which schedule
@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, (0.5, 0.1, 0.5, 0.15, True, 'sequential')),
        ({'sampling_ratio': 0.6}, (0.6, 0.1, 0.5, 0.15, True, 'sequential')),
        ({'s_min': 0.1, 's_max': 0.5}, (0.5, 0.1, 0.5, 0.15, True, 'sequential')),
        ({'prefer': 'small', 'clip_quantile': 0.9}, (0.5, 0.1, 0.5, 0.15, True, 'sequential')),
        # Exact probabilities where they are needed, or asked for.
        ({'reweight': True}, (0.5, 0.1, 0.5, 0.15, True, 'systematic')),
        ({'draw': 'systematic'}, (0.5, 0.1, 0.5, 0.15, True, 'systematic')),
        ({'schedule': 'constant', 'draw': 'sequential'}, (0.6, 0.3, 1.0, 0.0, False, 'sequential')),
        # As configs had it before there was a schedule: all that they leave out is what it was.
        ({'s_min': 0.3, 's_max': 1.0, 'sampling_ratio': 0.5}, (0.5, 0.3, 1.0, 0.0, False, 'systematic')),
        ({'s_min': 0.3}, (0.6, 0.3, 1.0, 0.0, False, 'systematic')),
        ({'s_min': 0.1}, (0.6, 0.1, 1.0, 0.0, False, 'systematic')),
        ({'s_min': 1.0}, (0.6, 1.0, 1.0, 0.0, False, 'systematic')),
        ({'s_max': 0.5}, (0.6, 0.3, 0.5, 0.0, False, 'systematic')),
        ({'schedule': 'constant'}, (0.6, 0.3, 1.0, 0.0, False, 'systematic')),
        ({'schedule': 'constant', 's_min': 0.1, 's_max': 0.5}, (0.6, 0.1, 0.5, 0.0, False, 'systematic')),
        # What knows of schedules means the authors'.
        ({'s_min': 0.2, 'schedule': 'authors'}, (0.5, 0.2, 0.5, 0.15, True, 'sequential')),
        ({'s_min': 0.2, 'ramp': 0.3}, (0.5, 0.2, 0.5, 0.3, True, 'sequential')),
        ({'ramp': 0, 'whole_first_epoch': False}, (0.5, 0.1, 0.5, 0.0, False, 'sequential')),
        ({'draw': 'uniform'}, (0.5, 1.0, 1.0, 0.0, False, 'uniform')),
        ({'draw': 'uniform', 'sampling_ratio': 0.3, 'whole_first_epoch': True}, (0.3, 1.0, 1.0, 0.0, True, 'uniform')),
    ],
)
def test_what_arguments_ask_for(options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert tuple(vars(built(**options)).values()) == expected
    assert schedule_of(options) == built(**options)


def test_defaults_are_the_authors_numbers() -> None:
    defaults = AUSAMOptimWrapper.__init__.__defaults__ or ()
    assert [float(value) for value in defaults if isinstance(value, Unset)] == [0.5, 0.1, 0.5, 0.15]


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'draw': 'sequential', 'reweight': True}, r"reweight=True is not allowed.*draw='systematic'"),
        ({'draw': 'uniform', 's_min': 0.3}, r's_min=0.3 is not allowed.*keeps no scores'),
        ({'draw': 'uniform', 'prefer': 'small'}, r"prefer='small' is not allowed.*keeps no scores"),
        ({'draw': 'uniform', 'schedule': 'authors'}, r"schedule='authors' is not allowed.*keeps no scores"),
        ({'schedule': 'constant', 'ramp': 0.1}, r"ramp=0.1 is not allowed.*schedule='authors', ramp=0.1"),
        ({'schedule': 'constant', 'whole_first_epoch': True}, r'whole_first_epoch=True is not allowed'),
        ({'ramp': 1.5}, r'ramp=1.5 is not allowed: it must be a finite number in \[0, 1\]'),
        ({'whole_first_epoch': 1}, r'whole_first_epoch=1 is not allowed: it must be True or False'),
        ({'schedule': 'linear'}, r"schedule='linear' is not allowed: it must be one of 'authors', 'constant'"),
        ({'draw': 'multinomial'}, r"draw='multinomial' is not allowed: it must be one of 'sequential', 'systematic'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        built(**options)


# -------------------------------------------------------------------- places
def test_the_authors_200_epochs() -> None:
    length = TrainingLength(200, 196)
    found = {epoch: AUTHORS.s_max_at(length.place(epoch)) for epoch in (0, 1, 15, 29, 30, 31, 199)}
    expected = {0: 0.1, 1: 0.1 + 0.4 / 30, 15: 0.3, 29: 0.1 + 0.4 * 29 / 30, 30: 0.5, 31: 0.5, 199: 0.5}
    assert found == pytest.approx(expected, rel=1e-12)
    assert [AUTHORS.ratio_at(length.place(epoch)) for epoch in (0, 1, 199)] == [1.0, 0.5, 0.5]


def test_places_of_an_endless_epoch_and_of_one_after_the_other_are_the_same() -> None:
    length = TrainingLength(12.5, 4)
    for iteration in range(50):
        assert length.place(0, iteration) == length.place(*divmod(iteration, 4))
    assert [length.place(0, iteration).in_first_epoch for iteration in (0, 3, 4)] == [True, True, False]


def test_without_epochs_the_ramp_goes_by_iterations() -> None:
    length = TrainingLength(1000, None)
    assert not length.place(0, 0).in_first_epoch
    assert [AUTHORS.s_max_at(length.place(0, i)) for i in (0, 75, 150, 999)] == pytest.approx([0.1, 0.3, 0.5, 0.5])


def test_constant_is_constant() -> None:
    places = [TrainingLength(8, 5).place(epoch) for epoch in range(8)]
    assert {(CONSTANT.s_max_at(p), CONSTANT.ratio_at(p)) for p in (*places, AFTER_RAMP)} == {(1.0, 0.6)}


# -------------------------------------------------------------------- lengths
class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(20))


def loop(max_iters: int) -> Any:
    found = object.__new__(IterBasedTrainLoop)
    found._max_iters = max_iters
    return found


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('drawn', [False, True])
def test_an_epoch_of_an_infinite_sampler_is_one_pass_of_all_ranks(
    ranks: int, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mm_sharp.hooks.history.get_world_size', lambda: ranks)
    data = list(range(22))
    source = InfiniteSampler(data, seed=0)
    loader = DataLoader(
        data, **(dict(batch_sampler=AUSAMSampler(source, 4)) if drawn else dict(sampler=source, batch_size=4))
    )
    length = training_length(loop(60), loader)
    assert length == TrainingLength(60 / (6 if ranks == 1 else 3), 6 if ranks == 1 else 3)


def test_lengths_of_other_loaders() -> None:
    data = list(range(22))
    finite = DataLoader(data, batch_size=4, sampler=DefaultSampler(data, seed=0))
    assert training_length(loop(60), finite) == TrainingLength(10, 6)
    assert training_length(SimpleNamespace(max_epochs=7), finite) == TrainingLength(7, 6)
    assert training_length(loop(60), DataLoader(Stream(), batch_size=4)) == TrainingLength(60, None)


# -------------------------------------------------------------------- cost
@pytest.mark.parametrize(('epochs', 'expected'), [(200, 1.005), (8, 1.125), (1, 2.0), (0.5, 2.0)])
def test_what_a_training_costs(epochs: float, expected: float) -> None:
    cost = AUSAMOptimWrapper.theoretical_cost(32)
    assert cost == Cost(1.0, 1.0, first_epoch=2.0)
    assert cost.over(epochs) == pytest.approx(expected)
    assert AUSAMOptimWrapper.theoretical_cost(32, schedule='constant', sampling_ratio=0.5).over(epochs) == 1.0


@pytest.mark.parametrize('options', [{}, {'sampling_ratio': 0.3}, {'schedule': 'constant'}])
def test_epochs_at_equal_compute_cost_what_they_are_to(options: dict[str, Any]) -> None:
    cost = AUSAMOptimWrapper.theoretical_cost(40, **options)
    for compute in (0.5, 2.0, 8.0, 200.0):
        epochs = cost.epochs_for(compute)
        assert epochs * cost.over(epochs) == pytest.approx(compute)


def test_what_says_less_in_words() -> None:
    """A ramp that ends within the first epoch, batches that cannot be cut, and draws in the data loader."""
    wrapper, model = AUSAMOptimWrapper(momentum_sgd(make())), make()
    assert in_words(wrapper, 32, TrainingLength(4, 10), model)['samples'].endswith('s from 0.1 to 0.5')
    alone = in_words(wrapper, 1, TrainingLength(4, 10), model)
    assert alone['samples'].startswith("1 of 1 in both passes, as with SAM and at SAM's cost: a larger batch")
    assert alone['cost'].startswith("2.00 times the base optimizer's")
    wrapper.sampler = AUSAMSampler(DefaultSampler(range(32)), 8)
    assert 'drawn by the data loader' in in_words(wrapper, 32, TrainingLength(4, 10), model)['samples']


def test_the_run_in_words() -> None:
    wrapper, model = AUSAMOptimWrapper(momentum_sgd(make())), make()
    lines = in_words(wrapper, 32, TrainingLength(20, 10), model)
    assert lines['samples'].startswith('16 of 32 in both passes; all in the first epoch; the larger the loss')
    assert lines['samples'].endswith('s_max 0.1 to 0.5 over the first 3 epochs')
    assert lines['cost'].startswith("1.05 times the base optimizer's over 20 epochs: 2.00 in the first, then 1.00")
    assert "ToyNet's square_loss (MSELoss), ToyNet's size_loss (SizeLoss)" in lines['losses']
    endless = in_words(wrapper, 32, TrainingLength(1000, None), None)
    assert 'first 150 iterations' in endless['samples']
    assert 'no whole first epoch' in endless['samples']
    assert endless['cost'].startswith("1.00 times the base optimizer's (")
    assert 'losses' not in endless
