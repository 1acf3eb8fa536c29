"""Draws by their place in the training, one batch's draw, and what travels between host and device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mm_sharp.ops.host_copy import HostCopy, to_device
from mm_sharp.samples.draw import BatchDraw, BatchDrawer
from mm_sharp.samples.history import Keys, PendingUpdates, SampleHistory
from mm_sharp.samples.schedule import Schedule
from mm_sharp.samples.seeds import RngStream, make_generator, shared_seed
from tests.checkpoints import through_disk

NAN = math.nan


def keys(count: int, first: int = 0) -> Keys:
    return [('toys', number) for number in range(first, first + count)]


def history_with(scores: list[float]) -> SampleHistory:
    """A history in which sample i of ``keys`` has ``scores[i]``; NaN for one that was never seen."""
    history = SampleHistory()
    history.update(keys(len(scores)), scores)
    return history


# -------------------------------------------------------------------- generators
def test_the_same_place_gives_the_same_numbers() -> None:
    first, again = (torch.rand(5, generator=make_generator(3, RngStream.SAMPLES, 1, 70)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize('seed', [0, 2**32 + 5, 2**63 - 1])
def test_every_place_of_a_run_has_numbers_of_its_own(seed: int) -> None:
    places = [(kind, rank, step) for kind in RngStream for rank in range(4) for step in (*range(60), 2**31, 2**32 - 1)]
    seen = {make_generator(seed, kind, rank, step).initial_seed() for kind, rank, step in places}
    assert len(seen) == len(places)
    assert max(seen) > 2**62  # all 64 bits are used


def test_runs_of_different_seeds_draw_differently() -> None:
    seen = {make_generator(seed, RngStream.MASK, 0, 0).initial_seed() for seed in range(500)}
    assert len(seen) == 500


def test_making_a_generator_leaves_the_global_ones_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.rand(3, generator=make_generator(0, RngStream.TIES, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize(('given', 'expected'), [(7, 7), (2**40, 2**40), (-1, 2**63 - 1)])
def test_the_shared_seed_is_torchs(given: int, expected: int) -> None:
    torch.manual_seed(given)
    assert shared_seed() == expected
    make_generator(shared_seed(), RngStream.SAMPLES, 0, 0)


# -------------------------------------------------------------------- one batch's draw
HISTORIES = {
    'ties, zeros, one dominant, unseen': [0.0, 0.0, 0.2, 0.2, 0.2, 90.0, NAN, NAN],
    'spread': [0.1, 0.9, 0.4, 0.2, 0.7, 0.3, 0.8, 0.5],
    'none seen': [NAN] * 8,
    'all equal': [0.4] * 8,
}


@pytest.mark.parametrize('scores', HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize(('ratio', 'k'), [(0.5, 4), (0.6, 5)])
@pytest.mark.slow
def test_frequencies_of_drawn_batches_match_pi(scores: list[float], ratio: float, k: int) -> None:
    drawer = BatchDrawer(history_with(scores), Schedule(ratio, 0.3, 1.0))
    counts, draws = np.zeros(8), 1000
    for step in range(draws):
        draw = drawer.draw(keys(8), make_generator(1, RngStream.SAMPLES, 0, step))
        assert len(set(draw.chosen.tolist())) == k
        counts[draw.chosen] += 1
    assert draw.pi.sum() == pytest.approx(k, rel=1e-12)
    error = np.sqrt(draw.pi * (1 - draw.pi) / draws)
    assert (np.abs(counts / draws - draw.pi) <= 4 * error + 1e-12).all()


def test_a_draw_knows_the_scores_it_was_made_of() -> None:
    scores = HISTORIES['spread']
    draw = BatchDrawer(history_with(scores), Schedule(0.25, 0.5, 2.0)).draw(keys(10), torch.Generator())
    assert draw.size == 10
    assert draw.scores[:8].tolist() == pytest.approx(scores, rel=1e-6)
    assert np.isnan(draw.scores[8:]).all()
    sizes = [0.5 + 1.5 * (x - 0.1) / 0.8 for x in scores] + [2.0, 2.0]
    assert draw.pi == pytest.approx([3 * size / sum(sizes) for size in sizes], rel=1e-6)
    assert draw.weights == pytest.approx([1 / (10 * draw.pi[row]) for row in draw.chosen], rel=1e-12)


@pytest.mark.parametrize(('ratio', 'size', 'k'), [(0.6, 1, 1), (1e-9, 32, 1), (1.0, 7, 7), (0.6, 5, 3), (0.07, 100, 7)])
def test_counts(ratio: float, size: int, k: int) -> None:
    draw = BatchDrawer(SampleHistory(), Schedule(ratio, 0.3, 1.0)).draw(keys(size), torch.Generator())
    assert (len(draw.chosen), draw.size) == (k, size)
    assert draw.pi == pytest.approx([k / size] * size)


def test_equal_bounds_are_the_uniform_control() -> None:
    draw = BatchDrawer(history_with(HISTORIES['spread']), Schedule(0.5, 0.7, 0.7)).draw(keys(8), torch.Generator())
    assert draw.pi.tolist() == [0.5] * 8
    assert draw.weights.tolist() == [0.25] * 4
    assert draw.scalars()['sampling_entropy'] == pytest.approx(1.0, abs=1e-15)


def test_the_draw_follows_the_history_as_it_is() -> None:
    history = history_with([1.0, 1.0, 1.0, 1.0])
    drawer = BatchDrawer(history, Schedule(0.25, 0.1, 1.0))
    assert drawer.draw(keys(4), torch.Generator()).pi.tolist() == [0.25] * 4
    history.update(keys(1), [5.0])
    assert drawer.draw(keys(4), torch.Generator()).pi == pytest.approx([1 / 1.3, *[0.1 / 1.3] * 3])


@pytest.mark.parametrize(
    ('pi', 'scores', 'entropy', 'large'),
    [
        ([0.5, 0.5], [1.0, 1.0], 1.0, 1.0),
        ([0.25, 0.75], [1.0, 3.0], -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2), 0.5),
        ([1.0], [NAN], 1.0, 1.0),
        # Shares 1/8, 1/4, 1/8, 1/2 of K = 2; of 0 to 8 the middle, 4 itself, is not above the middle.
        ([0.25, 0.5, 0.25, 1.0], [0.0, 4.0, 8.0, NAN], (2 * 3 / 8 + 2 / 4 + 1 / 2) / 2, 0.5),
    ],
)
def test_scalars_worked_by_hand(pi: list[float], scores: list[float], entropy: float, large: float) -> None:
    scalars = BatchDraw(np.array([0]), np.array(pi), np.array(scores)).scalars()
    assert scalars == {'sampling_entropy': pytest.approx(entropy, rel=1e-12), 'large_scores': large}


# -------------------------------------------------------------------- between host and device
def test_a_host_copy_is_of_its_moment() -> None:
    tensor = torch.ones(3, requires_grad=True)
    copy = HostCopy(tensor * 2)
    values = torch.arange(4.0)
    second = HostCopy(values)
    values.zero_()
    assert copy.numpy().tolist() == [2.0] * 3
    assert second.numpy().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert second.numpy().dtype == np.float32


def test_to_device_copies() -> None:
    array = np.array([1, 5, 7])
    array.setflags(write=False)  # as numpy's views often are: torch would warn about it
    tensor = to_device(array, torch.device('cpu'))
    assert (tensor.dtype, tensor.tolist()) == (torch.int64, [1, 5, 7])
    tensor.zero_()
    assert array.tolist() == [1, 5, 7]


# -------------------------------------------------------------------- visits
def scores_of(history: SampleHistory, count: int) -> list[float]:
    return history.scores(keys(count)).tolist()


def test_visits_are_written_when_the_next_ones_come() -> None:
    history = SampleHistory()
    visits = PendingUpdates(history)
    visits.add(keys(2), torch.tensor([0.5, -0.25]))
    assert len(history) == 0
    visits.add(keys(1, first=2), torch.tensor([4.0]))
    assert scores_of(history, 2) == [0.5, 0.25]
    assert len(history) == 2
    visits.flush()
    assert scores_of(history, 3) == [0.5, 0.25, 4.0]
    visits.flush()
    assert scores_of(history, 3) == [0.5, 0.25, 4.0]
    assert history.state_dict()['data_sets']['toys']['visits'].tolist() == [1, 1, 1]


def test_visits_keep_the_values_of_their_moment() -> None:
    history = SampleHistory()
    visits = PendingUpdates(history)
    differences = torch.tensor([1.0, 2.0])
    visits.add(keys(2), differences)
    differences.zero_()
    visits.flush()
    assert scores_of(history, 2) == [1.0, 2.0]


def test_visits_in_flight_go_with_a_checkpoint() -> None:
    """And writing one leaves them in flight: early in the history, they would change what is drawn before."""
    history, other = SampleHistory(), SampleHistory()
    visits, loaded = PendingUpdates(history), PendingUpdates(other)
    assert visits.state_dict() == {}
    visits.add(keys(2), torch.tensor([0.5, NAN]))
    state = visits.state_dict()
    assert len(history) == 0
    loaded.add(keys(1, first=5), torch.tensor([9.0]))  # replaced
    loaded.load_state_dict(through_disk(state))
    assert len(other) == 0
    for either in (visits, loaded):
        either.flush()
        assert scores_of(either.history, 1) == [0.5]
        assert len(either.history) == 1


def test_an_empty_state_drops_what_is_in_flight() -> None:
    history = SampleHistory()
    visits = PendingUpdates(history)
    visits.add(keys(1), torch.tensor([1.0]))
    visits.load_state_dict({})
    visits.flush()
    assert len(history) == 0


@pytest.mark.parametrize('bad', [NAN, math.inf, -math.inf])
def test_what_is_not_finite_is_no_visit(bad: float) -> None:
    history = SampleHistory()
    visits = PendingUpdates(history)
    visits.add(keys(3), torch.tensor([1.0, bad, 3.0]))
    visits.flush()
    assert len(history) == 2
    assert scores_of(history, 3)[::2] == [1.0, 3.0]


def test_a_write_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    history = SampleHistory()
    visits = PendingUpdates(history)
    visits.add(keys(1), torch.tensor([2.0]))
    with monkeypatch.context() as patch:
        patch.setattr(history, 'update', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            visits.flush()
    visits.flush()
    visits.flush()
    assert scores_of(history, 1) == [2.0]
    assert history.state_dict()['data_sets']['toys']['visits'].tolist() == [1]


@pytest.mark.parametrize('seed', [0, 5, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize('place', [(), (0, 7), (3, 2**32 + 1, 2**62 + 5)])
def test_generators_are_numpys_seed_sequence(seed: int, place: tuple[int, ...]) -> None:
    """As it makes them of a list: the same draws as ever."""
    low, high = np.random.SeedSequence([seed, 1, *place]).generate_state(2).tolist()
    assert make_generator(seed, RngStream.SAMPLES, *place).initial_seed() == low | high << 32
