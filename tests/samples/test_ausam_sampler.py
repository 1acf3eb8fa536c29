"""The batch sampler against torch's, its draws against the probabilities, and what is in flight to the wrapper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import DistSamplerSeedHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from mm_sharp.samples.ausam_sampler import AUSAMSampler
from mm_sharp.samples.draw import BatchDrawer, DrawQueue
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.schedule import Schedule
from mm_sharp.samples.selection import Preference, inclusion_probabilities, sample_count
from tests.checkpoints import through_disk
from tests.tiny_runs import PLAIN, Points, make_runner

Key = tuple[str, int]

pytestmark = [
    pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning'),  # Python 3.12, of fork
]


class Shelf:
    """Keys of samples by index: ids that are not the indices."""

    def keys(self, indices: Sequence[int]) -> list[Key]:
        return [('toys', 1000 + index) for index in indices]


class Numbers(Dataset):
    """Samples that are their own index, and a count of how often each was read, in whatever process."""

    def __init__(self, length: int) -> None:
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        return index


def key_list(indices: Any) -> list[Key]:
    return Shelf().keys([int(index) for index in indices])


def make(
    source: Any,
    batch_size: int = 4,
    *,
    ratio: float = 0.5,
    history: SampleHistory | None = None,
    rank: int = 0,
    seed: int = 0,
    **kwargs: Any,
) -> AUSAMSampler:
    """An attached sampler; a number stands for a DefaultSampler over so many samples."""
    source = DefaultSampler(range(source), seed=3) if isinstance(source, int) else source
    sampler = AUSAMSampler(source, batch_size, **kwargs)
    drawer = BatchDrawer(SampleHistory() if history is None else history, Schedule(ratio, 0.3, 1.0))
    sampler.attach(drawer, Shelf(), seed, rank)
    return sampler


def scored(scores: Sequence[float]) -> SampleHistory:
    """A history of samples 0, 1, ... with these averages; NaN for one never seen."""
    history = SampleHistory()
    history.update(key_list(range(len(scores))), scores)
    return history


# -------------------------------------------------------------------- mini-batches
@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.floats(0.05, 1.0))
def test_batches_are_torchs_with_samples_missing(length: int, size: int, drop_last: bool, ratio: float) -> None:
    ours = make(range(length), size, ratio=ratio, drop_last=drop_last)
    theirs = BatchSampler(range(length), size, drop_last)
    groups, batches = list(theirs), list(ours)
    assert len(ours) == len(theirs) == len(batches) == len(groups)
    for group, batch in zip(groups, batches, strict=True):
        assert len(batch) == sample_count(ratio, len(group))
        assert batch == [index for index in group if index in set(batch)], 'distinct, of this group, in its order'


def test_all_samples_at_a_ratio_of_one_in_the_samplers_order() -> None:
    shuffled = DefaultSampler(range(22), seed=5)
    assert list(make(shuffled, 4, ratio=1.0)) == list(BatchSampler(shuffled, 4, False))


@pytest.mark.parametrize(('drop_last', 'sizes'), [(False, [3, 3, 2]), (True, [3, 3])])
def test_a_last_batch_that_is_not_full(drop_last: bool, sizes: list[int]) -> None:
    sampler = make(13, 5, ratio=0.6, drop_last=drop_last)
    assert [len(batch) for batch in sampler] == sizes
    assert len(sampler) == len(sizes)


def test_a_sampler_without_length() -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            index = 0
            while True:
                yield index
                index += 1

    sampler = make(Endless(), 4)
    batches = iter(sampler)
    for number in range(5):
        assert set(next(batches)) < set(range(4 * number, 4 * number + 4))
    with pytest.raises(TypeError, match='has no len'):
        len(sampler)


# -------------------------------------------------------------------- draws
@pytest.mark.parametrize('scores', [[0.1, 0.2, 0.3, 0.4, 2.0], [math.nan, 0.2, 0.0, math.nan, 1.0], [math.nan] * 5])
@pytest.mark.slow
def test_inclusion_frequencies(scores: list[float]) -> None:
    """Over many epochs, each sample is loaded with its probability, within 4 standard errors."""
    epochs, total = 1_500, len(scores)
    source = DefaultSampler(range(total), shuffle=False, seed=0)
    sampler = make(source, total, ratio=0.6, history=scored(scores))
    expected = inclusion_probabilities(np.array(scores), 3)
    counts = np.zeros(total)
    for epoch in range(epochs):
        source.set_epoch(epoch)
        (batch,) = sampler
        counts[batch] += 1
        assert sampler.take(key_list(batch)).pi == pytest.approx(expected)
    errors = 4 * np.sqrt(expected * (1 - expected) / epochs)
    assert (np.abs(counts / epochs - expected) <= errors + 1e-12).all()


def test_it_draws_by_the_wrappers_preference() -> None:
    scores, preference = [0.1, 0.2, 0.3, 0.4, 2.0], Preference(small=True, quantile=0.75)
    sampler = AUSAMSampler(DefaultSampler(range(5), shuffle=False, seed=0), 5)
    sampler.attach(BatchDrawer(scored(scores), Schedule(0.6, 0.3, 1.0), preference), Shelf(), seed=0, rank=0)
    (batch,) = sampler
    pi = sampler.take(key_list(batch)).pi
    assert pi == pytest.approx(inclusion_probabilities(np.array(scores), 3, 0.3, 1.0, preference), rel=1e-6)
    assert pi[0] > pi[1] > pi[2] > pi[3] == pi[4]


def test_an_epoch_can_be_repeated_and_others_differ() -> None:
    source = DefaultSampler(range(40), shuffle=False, seed=0)
    sampler = make(source, history=scored(np.linspace(0, 1, 40).tolist()))
    epochs = []
    for epoch in (0, 1, 0, 1):
        source.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[:2] == epochs[2:]
    assert epochs[0] != epochs[1]
    assert list(make(source, seed=1)) != list(make(source, seed=2))


def test_samplers_that_do_not_know_their_epoch() -> None:
    """MMEngine's hook tells it; else one that does not shuffle might leave out the same samples in every epoch."""
    told = []

    class Source(SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    sampler = make(Source(range(40)))
    loader = DataLoader(Numbers(40), batch_sampler=sampler)
    epochs = []
    for epoch in (0, 1, 0):
        runner = SimpleNamespace(train_loop=SimpleNamespace(dataloader=loader), epoch=epoch)
        DistSamplerSeedHook().before_train_epoch(runner)
        assert sampler.sampler.epoch == epoch
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert told == [0, 1, 0], "the sampler's own method is called as well"


def test_mmengines_hook_reaches_a_sampler_that_knows_its_epoch() -> None:
    source = DefaultSampler(range(8), seed=0)
    loader = DataLoader(Numbers(8), batch_sampler=make(source))
    DistSamplerSeedHook().before_train_epoch(SimpleNamespace(train_loop=SimpleNamespace(dataloader=loader), epoch=7))
    assert source.epoch == 7
    assert loader.batch_sampler.sampler is source


def sampler_of_rank(rank: int, dataset: Any) -> DefaultSampler:
    source = DefaultSampler(dataset, seed=0)
    source.rank, source.world_size, source.num_samples = rank, 2, len(dataset) // 2
    return source


def test_two_ranks_draw_from_their_own_halves() -> None:
    batches = [list(make(sampler_of_rank(rank, range(40)), rank=rank)) for rank in (0, 1)]
    drawn = [{index for batch in part for index in batch} for part in batches]
    assert len(drawn[0]) == len(drawn[1]) == 10
    assert not drawn[0] & drawn[1]
    same_half = [list(make(SequentialSampler(range(40)), rank=rank)) for rank in (0, 1)]
    assert same_half[0] != same_half[1], 'each rank has random numbers of its own'


# -------------------------------------------------------------------- what is read
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'num_workers': 2, 'persistent_workers': True},
        {'num_workers': 2, 'prefetch_factor': 3},
        pytest.param({'num_workers': 1, 'multiprocessing_context': 'spawn'}, marks=pytest.mark.slow),
    ],
    ids=['no workers', 'persistent', 'prefetch 3', 'spawn'],
)
def test_only_drawn_samples_are_read(options: dict[str, Any]) -> None:
    """46 samples in batches of 8: five batches of 8 and one of 6, hence 5 * 5 + 4 samples read at a ratio of 0.6."""
    dataset = Numbers(46)
    source = DefaultSampler(dataset, seed=0)
    sampler = make(source, 8, ratio=0.6)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    assert len(loader) == 6
    for epoch in range(1 if 'multiprocessing_context' in options else 3):
        source.set_epoch(epoch)
        dataset.reads.zero_()
        received = []
        for batch in loader:
            sampler.take(key_list(batch))
            received += batch.tolist()
        assert int(dataset.reads.sum()) == 5 * 5 + 4 == len(received)
        assert dataset.reads.nonzero()[:, 0].tolist() == sorted(received), 'each at most once'


@pytest.mark.parametrize('sampler_type', ['DefaultSampler', 'InfiniteSampler'])
def test_from_a_config(sampler_type: str) -> None:
    dataset = Numbers(20)
    config = dict(
        dataset=dataset,
        batch_size=6,
        num_workers=0,
        sampler=dict(type=sampler_type, shuffle=True),
        batch_sampler=dict(type='AUSAMSampler', drop_last=True),
        collate_fn=dict(type='default_collate'),
    )
    loader = Runner.build_dataloader(config, seed=4)
    sampler = loader.batch_sampler
    assert isinstance(sampler, AUSAMSampler)
    assert (sampler.batch_size, sampler.drop_last, len(loader)) == (6, True, 3)
    sampler.attach(BatchDrawer(SampleHistory(), Schedule(0.5, 0.3, 1.0)), Shelf(), seed=0, rank=0)
    batches = iter(loader)
    reads = loader.dataset.reads
    for number in range(3):
        batch = next(batches)
        assert len(sampler.take(key_list(batch)).chosen) == 3
        assert int(reads.sum()) == 3 * (number + 1)
    with pytest.raises(StopIteration) if sampler_type == 'DefaultSampler' else pytest.MonkeyPatch().context():
        next(batches)


def test_drop_last_belongs_to_the_batch_sampler() -> None:
    """A recipe's own drop_last stops torch; the docs say what to write."""
    config = dict(
        dataset=Numbers(8), batch_size=4, sampler=dict(type='DefaultSampler'), batch_sampler=dict(type='AUSAMSampler')
    )
    with pytest.raises(ValueError, match='mutually exclusive'):
        Runner.build_dataloader({**config, 'drop_last': True})
    corrected = {**config, 'drop_last': False, 'batch_sampler': dict(type='AUSAMSampler', drop_last=True)}
    assert Runner.build_dataloader(corrected).batch_sampler.drop_last


# -------------------------------------------------------------------- take
def on_the_way(count: int, size: int = 4) -> tuple[AUSAMSampler, list[list[Key]]]:
    """A sampler with ``count`` batches in flight, and their keys."""
    sampler = make(size * (count + 1), size)
    batches = iter(sampler)
    sampler.batches = batches  # type: ignore[attr-defined]  # keeps the iteration alive
    return sampler, [key_list(next(batches)) for _ in range(count)]


def pending(sampler: AUSAMSampler) -> list[list[Key]]:
    return [draw['keys'] for draw in sampler.state_dict()['draws']]


def stranger(number: int = 0) -> Key:
    return ('elsewhere', number)


def test_first_in_first_out() -> None:
    sampler, keys = on_the_way(4)
    positions = []
    for batch in keys:
        positions.append(sampler.state_dict()['draws'][0]['position'])
        draw = sampler.take(batch)
        assert (draw.size, len(draw.chosen)) == (4, 2)
        assert draw.weights == pytest.approx(1 / (4 * draw.pi[draw.chosen]))
    assert positions == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match='a batch of 2 samples arrived where none were drawn'):
        sampler.take([stranger(0), stranger(1)])


def test_replaced_samples_are_accepted() -> None:
    sampler, keys = on_the_way(4)
    sampler.take([keys[0][0], stranger()])
    assert pending(sampler) == keys[1:]
    sampler.take([stranger(0), stranger(1)])
    assert pending(sampler) == keys[2:], 'all replaced: the first'
    sampler.take([stranger(), keys[2][1]])
    assert pending(sampler) == keys[3:]


def test_skipped_batches_are_dropped() -> None:
    sampler, keys = on_the_way(6)
    sampler.take(keys[2])
    assert pending(sampler) == keys[3:]
    sampler.take([keys[4][0], stranger()])
    assert pending(sampler) == keys[5:], 'also where a sample was replaced'


def test_the_best_match_wins_over_the_first() -> None:
    """A sample comes again in a later batch: in iteration-based training, where batches are skipped to resume."""
    history = SampleHistory()
    sampler = make([0, 1, 2, 3, 4, 5, 0, 1, 8], 3, ratio=1.0, history=history)
    list(sampler)
    assert sampler.take(key_list([0, 1, 8])).size == 3
    assert pending(sampler) == []


@pytest.mark.parametrize('size', [0, 1, 3])
def test_batches_of_another_length_are_refused(size: int) -> None:
    sampler, keys = on_the_way(2)
    with pytest.raises(RuntimeError, match=f'a batch of {size} samples arrived where 2 were drawn.* leave out'):
        sampler.take([*keys[0], stranger()][:size])
    assert pending(sampler) == keys, 'nothing is changed'


def test_a_batch_that_could_only_be_a_later_one_by_its_length_is_refused() -> None:
    sampler = make(range(6), 4)
    assert [len(batch) for batch in sampler] == [2, 1]
    with pytest.raises(RuntimeError, match='a batch of 1 samples arrived where 2 were drawn'):
        sampler.take([stranger()])


def test_keys_that_never_agree_are_refused() -> None:
    """Eight batches in a row may be replaced altogether, but not nine."""
    sampler, keys = on_the_way(30)
    for _ in range(2):
        for number in range(8):
            sampler.take([stranger(number), stranger(-1)])
        sampler.take([pending(sampler)[0][0], stranger()])
    for number in range(8):
        sampler.take([stranger(number), stranger(-1)])
    with pytest.raises(RuntimeError, match=r"last 9 batches.*expected \('toys', 10\d\d\) and got \('elsewhere', 7\)"):
        sampler.take([stranger(7), stranger(-1)])
    assert pending(sampler) == keys[26:]


def test_a_step_that_is_tried_again_gets_the_same_draw() -> None:
    sampler, keys = on_the_way(2)
    first = sampler.take(keys[0])
    assert sampler.take(keys[0]) is first
    assert sampler.take(keys[1]) is not first


def test_a_new_iteration_forgets_the_old_one() -> None:
    sampler, keys = on_the_way(3)
    old = sampler.batches  # type: ignore[attr-defined]
    sampler.sampler.set_epoch(1)
    new = iter(sampler)
    expected = key_list(next(new))
    next(old)
    assert pending(sampler) == [expected] != keys[:1]


def test_batches_that_nobody_takes_do_not_pile_up() -> None:
    sampler = make(InfiniteSampler(range(64), seed=0), 16)
    batches = iter(sampler)
    for _ in range(1100):
        last = next(batches)
    assert len(pending(sampler)) == 1024
    sampler.take(key_list(last))
    assert pending(sampler) == []


# -------------------------------------------------------------------- resume
def train(sampler: AUSAMSampler, history: SampleHistory, batches: Iterator[torch.Tensor], steps: int) -> list[Any]:
    """Steps whose differences change the history at once; returns the batches and how they were drawn."""
    log = []
    for _ in range(steps):
        batch = next(batches)
        draw = sampler.take(key_list(batch))
        history.update(key_list(batch), (batch + 1) ** 2 * (1 + len(history)))
        log.append((batch.tolist(), draw.chosen.tolist(), draw.pi.tolist()))
    return log


def resumable(workers: int, prefetch: int | None = 2) -> tuple[AUSAMSampler, SampleHistory, DataLoader[Any]]:
    """Twelve samples in batches of four, over and over: a score changes before its sample's next draw."""
    history = SampleHistory()
    sampler = make(InfiniteSampler(range(12), seed=0), history=history)
    options = {'num_workers': workers, 'prefetch_factor': prefetch} if workers else {}
    return sampler, history, DataLoader(Numbers(12), batch_sampler=sampler, **options)


def test_in_epochs_loading_ahead_changes_no_draw() -> None:
    """Each sample comes once an epoch, so its score cannot change between its draw and its step."""
    logs = []
    for options in ({}, {'num_workers': 2, 'prefetch_factor': 3, 'persistent_workers': True}):
        history, log = SampleHistory(), []
        sampler = make(40, history=history)
        loader = DataLoader(Numbers(40), batch_sampler=sampler, **options)
        for epoch in range(3):
            sampler.sampler.set_epoch(epoch)
            log += train(sampler, history, iter(loader), len(loader))
        logs.append(log)
    assert logs[0] == logs[1]
    assert len({tuple(pi) for _, _, pi in logs[0]}) > 10, 'the probabilities do change'


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('with_state', [True, False])
def test_resuming_in_mid_iteration_equals_never_stopping(workers: int, with_state: bool) -> None:
    """As MMEngine's iteration-based loop resumes: the consumed batches are loaded once more, and nobody takes them."""
    sampler, history, loader = resumable(workers)
    batches = iter(loader)
    train(sampler, history, batches, 5)
    state = through_disk({'history': history.state_dict(), 'sampler': sampler.state_dict()})
    assert len(state['sampler']['draws']) == 2 * workers
    expected = train(sampler, history, batches, 8)

    sampler, history, loader = resumable(workers)
    history.load_state_dict(state['history'])
    if with_state:
        sampler.load_state_dict(state['sampler'])
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = train(sampler, history, batches, 8)
    # Without the state, the draws in flight would have been made again, from a newer history.
    assert (resumed == expected) == (with_state or workers == 0)


def test_a_checkpoint_soon_after_a_resume_keeps_the_draws_not_reached() -> None:
    """Saved with four batches in flight, resumed with fewer: all are in the next checkpoint."""
    sampler, history, loader = resumable(2)
    batches = iter(loader)
    train(sampler, history, batches, 3)
    state = sampler.state_dict()
    assert [draw['position'] for draw in state['draws']] == [3, 4, 5, 6]
    again, history, loader = resumable(0)
    again.load_state_dict(state)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    train(again, history, batches, 1)
    assert [draw['position'] for draw in again.state_dict()['draws']] == [4, 5, 6]
    assert again.state_dict()['draws'][0]['pi'].equal(state['draws'][1]['pi'])


def test_draws_of_past_epochs_are_dropped() -> None:
    sampler, _ = on_the_way(2)
    again = make(12)
    again.load_state_dict(sampler.state_dict())
    again.sampler.set_epoch(1)
    next(iter(again))
    assert [draw['epoch'] for draw in again.state_dict()['draws']] == [1]


@pytest.mark.parametrize('change', ['batch size', 'data set'])
def test_draws_that_do_not_fit_any_more_are_made_anew(change: str) -> None:
    sampler, keys = on_the_way(3)
    source = DefaultSampler(range(16), seed=3 if change == 'batch size' else 8)
    size = 5 if change == 'batch size' else 4
    fresh, loaded = make(source, size), make(source, size)
    loaded.load_state_dict(sampler.state_dict())
    assert list(loaded) == list(fresh)
    assert key_list(next(iter(fresh))) != keys[0]


# -------------------------------------------------------------------- not attached
def error_of(batches: Iterator[Any]) -> str:
    """What the first batch raises. The workers end here: the error is a reference cycle that would keep them."""
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    if hasattr(batches, '_shutdown_workers'):
        batches._shutdown_workers()
    return str(caught.value)


@pytest.mark.parametrize('workers', [0, 2])
def test_without_a_wrapper_the_first_batch_says_what_is_missing(workers: int) -> None:
    dataset = Numbers(8)
    source = InfiniteSampler(dataset, seed=0)
    sampler = AUSAMSampler(source, 4)
    for data in (dataset, Subset(dataset, range(8))):  # torch's Subset reads a batch at once
        message = error_of(iter(DataLoader(data, batch_sampler=sampler, num_workers=workers)))
        assert "optim_wrapper = dict(type='AUSAMOptimWrapper'" in message
        assert "train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler')" in message
    with pytest.raises(RuntimeError, match='AUSAMOptimWrapper'):
        next(iter(sampler))[0]
    assert int(dataset.reads.sum()) == 0
    untouched = InfiniteSampler(dataset, seed=0)
    assert [*itertools.islice(source, 20)] == [*itertools.islice(untouched, 20)], 'no index is lost'


class Marked(Points):
    """Points whose first number is their index."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs[:, 0] = torch.arange(8.0)


class Wrapper(Hook):
    """What the optimizer wrapper does with the sampler, at the same places, and a resume after ``start`` iterations."""

    def __init__(self, state: Any = None, start: int = 0) -> None:
        self.history = SampleHistory()
        self.state, self.start = state, start
        self.states: dict[int, Any] = {}
        self.log: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        sampler = runner.train_dataloader.batch_sampler
        sampler.attach(BatchDrawer(self.history, Schedule(0.5, 0.3, 1.0)), Shelf(), 0, 0)
        if self.state is not None:
            self.history.load_state_dict(self.state['history'])
            sampler.load_state_dict(self.state['sampler'])
            runner.train_loop._iter = self.start
        sampler.follow(runner.train_loop)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        indices = data_batch['inputs'][:, 0].long()
        draw = runner.train_dataloader.batch_sampler.take(key_list(indices))
        self.log[runner.iter] = (indices.tolist(), draw.pi.tolist())
        self.history.update(key_list(indices), (indices + 1) ** 2 * (1 + len(self.history)))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        state = {'history': self.history.state_dict(), 'sampler': runner.train_dataloader.batch_sampler.state_dict()}
        self.states[runner.iter + 1] = through_disk(state)


@pytest.mark.parametrize(
    'options',
    [{'num_workers': 0}, {'num_workers': 2}, {'num_workers': 2, 'persistent_workers': True}],
    ids=['no workers', 'workers', 'persistent'],
)
def test_in_mmengines_iteration_based_loop(options: dict[str, Any], tmp_path: Path) -> None:
    """Which starts its workers before there is a wrapper."""

    def run(hook: Wrapper) -> dict[int, Any]:
        sampler = AUSAMSampler(InfiniteSampler(range(8), seed=0), 4)
        loader = DataLoader(Marked(), batch_sampler=sampler, **options)
        train_cfg = {'by_epoch': False, 'max_iters': 9}
        kwargs = {'train_dataloader': loader, 'train_cfg': train_cfg, 'custom_hooks': [hook]}
        runner = make_runner(tmp_path, PLAIN, **kwargs, log_processor={'by_epoch': False})
        runner.train()
        # The workers end here: a Runner is a reference cycle, and would keep them until some later collection.
        runner.train_loop.dataloader_iterator = loader._iterator = None
        return hook.log

    first = Wrapper()
    expected = run(first)
    assert sorted(expected) == list(range(9))
    assert [len(indices) for indices, _ in expected.values()] == [2] * 9
    resumed = run(Wrapper(first.states[4], start=4))
    assert resumed == {iteration: expected[iteration] for iteration in range(4, 9)}


def test_following_other_loops_changes_nothing() -> None:
    sampler = on_the_way(2)[0]
    sampler.follow(SimpleNamespace(dataloader=None, iter=7))
    sampler.sampler.set_epoch(1)
    next(iter(sampler))
    assert len(pending(sampler)) == 1, 'nothing is skipped'


def iteration_loop(loader: DataLoader[Any], iteration: int) -> IterBasedTrainLoop:
    runner = SimpleNamespace(visualizer=SimpleNamespace())
    loop = IterBasedTrainLoop(runner, loader, max_iters=100)
    loop._iter = iteration
    return loop


def test_following_without_a_wrapper_keeps_the_error() -> None:
    loader = DataLoader(Marked(), batch_sampler=AUSAMSampler(range(8), 4), num_workers=1)
    loop = iteration_loop(loader, 0)
    loader.batch_sampler.follow(loop)
    assert 'AUSAMOptimWrapper' in error_of(loop.dataloader_iterator._iterator)


def test_batches_that_a_resumed_loop_skips_are_not_under_way() -> None:
    """Else one sample drawn of each batch could be taken for the same sample in an earlier batch."""
    sampler = make(InfiniteSampler(range(4), seed=0), 2)
    loop = iteration_loop(DataLoader(Marked(), batch_sampler=sampler), 500)
    sampler.follow(loop)
    batches = [next(loop.dataloader_iterator) for _ in range(503)]
    assert [draw['position'] for draw in sampler.state_dict()['draws']] == [500, 501, 502]
    assert pending(sampler) == [key_list(batch['inputs'][:, 0]) for batch in batches[500:]]


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'batch_size': 0}, 'batch_size should be a positive integer value'),
        ({'drop_last': 1}, r"AUSAMSampler: drop_last=1 .*True or False.*type='AUSAMSampler', drop_last=True"),
        ({'drop_last': None}, 'drop_last=None '),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    good = {'sampler': range(8), 'batch_size': 4, 'drop_last': False}
    AUSAMSampler(**good)
    with pytest.raises(ValueError, match=message):
        AUSAMSampler(**{**good, **arguments})


def test_an_empty_queue_refuses() -> None:
    with pytest.raises(RuntimeError, match='a batch of 1 samples arrived where none were drawn'):
        DrawQueue().take([stranger()])
