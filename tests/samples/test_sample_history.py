"""The history against a plain dict, its memory, the exchange between ranks, and checkpoints."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_sharp.samples import history as history_module
from mm_sharp.samples.history import SampleHistory
from tests.checkpoints import through_disk
from tests.toys import history_bytes

Key = tuple[str, int]
LOW, HIGH = -(2**63), 2**63 - 1

names = st.sampled_from(['coco', 'mpii', ''])
ids = st.one_of(st.integers(0, 8), st.sampled_from([LOW, HIGH, -1, 2**40]))
keys = st.tuples(names, ids)
differences = st.one_of(
    st.floats(-100, 100, width=32), st.sampled_from([0.0, -0.0, 1e30, math.nan, math.inf, -math.inf, 1e39])
)
visits = st.lists(st.tuples(keys, differences), max_size=12)
momenta = st.sampled_from([None, 0.0, 0.5, 0.9, 0.999])


class PlainHistory:
    """Weighted sums in a dict: every visit's weight is written out."""

    def __init__(self, momentum: float | None) -> None:
        self.past = 1.0 if momentum is None else momentum
        self.visits: dict[Key, list[tuple[float, float]]] = {}

    def update(self, batch: Sequence[tuple[Key, float]]) -> None:
        """One visit each; those of one key in one batch are one group of their mean."""
        groups: dict[Key, list[float]] = {}
        for key, value in batch:
            if math.isfinite(value) and abs(value) < 3.4e38:
                groups.setdefault(key, []).append(abs(value))
        for key, values in groups.items():
            self.add(key, sum(values) / len(values), len(values))

    def add(self, key: Key, mean: float, count: int) -> None:
        old = [(weight * self.past**count, value) for weight, value in self.visits.get(key, [])]
        self.visits[key] = [*old, *((self.past**j, mean) for j in range(count))]

    def scores(self, wanted: Sequence[Key]) -> list[float]:
        result = []
        for key in wanted:
            pairs = self.visits.get(key, [])
            total = sum(weight for weight, _ in pairs)
            result.append(sum(w * v for w, v in pairs) / total if pairs else math.nan)
        return result


ALL = [(name, number) for name in ('coco', 'mpii', '', 'none') for number in (*range(9), LOW, HIGH, -1, 2**40)]


def assert_equal_scores(history: SampleHistory, plain: PlainHistory) -> None:
    assert history.scores(ALL) == pytest.approx(plain.scores(ALL), rel=1e-5, abs=1e-30, nan_ok=True)


def assert_same_bits(first: SampleHistory, second: SampleHistory) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert list(one['data_sets']) == list(two['data_sets'])
    for name, fields in one['data_sets'].items():
        for field, tensor in fields.items():
            assert torch.equal(tensor, two['data_sets'][name][field]), (name, field)


def feed(history: SampleHistory, batch: Sequence[tuple[Key, float]]) -> None:
    history.update([key for key, _ in batch], [value for _, value in batch])


def exchange(ranks: Sequence[SampleHistory]) -> None:
    """What a collective does: everyone gets what all gathered, in the same order."""
    parts = [through_disk(rank.pending()) for rank in ranks]
    for rank in ranks:
        rank.merge(parts)


# -------------------------------------------------------------------- averages
@settings(max_examples=100)
@given(
    momenta,
    st.booleans(),
    st.lists(st.one_of(visits, st.sampled_from(['look', 'save', 'merge', 'compact'])), max_size=20),
)
def test_any_sequence_equals_a_plain_dict(momentum: float | None, distributed: bool, actions: list[Any]) -> None:
    history, plain = SampleHistory(momentum, distributed=distributed), PlainHistory(momentum)
    for action in actions:
        if action == 'save':
            history, old = SampleHistory(momentum, distributed=distributed), history
            history.load_state_dict(through_disk(old.state_dict()))
            assert_same_bits(history, old)
        elif action == 'merge' and distributed:
            exchange([history])
        elif action == 'compact':
            history.state_dict()
        elif isinstance(action, list):
            feed(history, action)
            plain.update(action)
        else:
            assert_equal_scores(history, plain)
    assert_equal_scores(history, plain)
    assert len(history) == len(plain.visits)


def test_the_running_average_worked_by_hand() -> None:
    history = SampleHistory()
    history.update([('a', 1)], [-2.0])
    history.update([('a', 1), ('a', 1), ('a', 2)], [4.0, 0.0, 5.0])
    assert history.scores([('a', 2), ('a', 1), ('b', 1)]).tolist()[:2] == [5.0, 2.0]
    assert math.isnan(history.scores([('b', 1)])[0])


def test_the_exponential_average_worked_by_hand() -> None:
    history = SampleHistory(momentum=0.5)
    expected = [8.0, (0.5 * 8 + 2) / 1.5, (0.25 * 8 + 0.5 * 2 + 4) / 1.75]
    for value, average in zip([8.0, 2.0, 4.0], expected, strict=True):
        history.update([('a', 1)], [value])
        assert history.scores([('a', 1)])[0] == pytest.approx(average, rel=1e-6)


def test_momentum_zero_keeps_the_last_visit() -> None:
    history = SampleHistory(momentum=0.0)
    for value in (3.0, 9.0, 1.0):
        history.update([('a', 1)], [value])
        assert history.scores([('a', 1)]).tolist() == [value]


def test_an_average_over_more_visits_than_are_counted_still_moves() -> None:
    history = SampleHistory()
    history.update_of('a', np.zeros(70_000, int), np.ones(70_000))
    history.update_of('a', np.zeros(65_000, int), np.full(65_000, 3.0))
    assert history.scores([('a', 0)])[0] == pytest.approx(2.0, abs=1e-2)
    assert history.state_dict()['data_sets']['a']['visits'].numpy().view(np.uint16).tolist() == [65_535]


def test_data_sets_do_not_collide_and_repeated_ones_share() -> None:
    history = SampleHistory()
    history.update([('coco', 3), ('mpii', 3), ('coco', 3)], [1.0, 10.0, 3.0])
    assert history.scores([('coco', 3), ('mpii', 3), ('mpii', 3)]).tolist() == [2.0, 10.0, 10.0]


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e300])
def test_differences_that_are_not_finite_are_ignored(bad: float) -> None:
    history = SampleHistory()
    history.update([('a', 1), ('a', 2), ('a', 1)], [1.0, bad, bad])
    assert history.scores([('a', 1)]).tolist() == [1.0]
    assert math.isnan(history.scores([('a', 2)])[0])
    assert len(history) == 1


def test_new_samples_in_any_order_end_sorted_and_found() -> None:
    shuffled = random.Random(0).sample(range(-(10**9), 10**9), 30_000)
    values = np.abs(np.array(shuffled, dtype=np.float32))
    history = SampleHistory()
    for start in range(0, len(shuffled), 700):
        history.update_of('a', shuffled[start : start + 700], values[start : start + 700])
        history.update_of('a', shuffled[: start + 1 : 97], values[: start + 1 : 97])
    assert history.scores_of('a', shuffled).tolist() == values.tolist()
    assert history.state_dict()['data_sets']['a']['ids'].tolist() == sorted(shuffled)


def test_ids_may_be_numpy_and_torch_integers() -> None:
    history = SampleHistory()
    history.update(
        [('a', np.int32(5)), (np.str_('a'), torch.tensor(6)), ('a', np.uint64(7))], torch.tensor([1.0, 2, 3])
    )  # type: ignore[list-item]
    assert history.scores([('a', 5), ('a', 6), ('a', 7)]).tolist() == [1.0, 2.0, 3.0]
    assert through_disk(history.state_dict())['data_sets']['a']['ids'].tolist() == [5, 6, 7]


def test_an_empty_batch_changes_nothing() -> None:
    history = SampleHistory()
    history.update([], [])
    assert history.scores([]).shape == (0,)
    assert len(history) == 0


# -------------------------------------------------------------------- ranks
@pytest.mark.slow
@settings(max_examples=50)
@given(momenta, st.sampled_from([2, 4]), st.lists(st.lists(visits, min_size=4, max_size=4), max_size=4))
def test_ranks_hold_the_same_after_an_exchange(momentum: float | None, size: int, epochs: list[list[Any]]) -> None:
    ranks = [SampleHistory(momentum, distributed=True) for _ in range(size)]
    plain = PlainHistory(momentum)
    for batches in epochs:
        seen: dict[Key, list[float]] = {}
        for rank, batch in zip(ranks, batches, strict=False):
            feed(rank, batch)
            for key, value in batch:
                seen.setdefault(key, []).append(value)
        plain.update([(key, value) for key, values in seen.items() for value in values])
        exchange(ranks)
        for rank in ranks[1:]:
            assert_same_bits(ranks[0], rank)
        assert_equal_scores(ranks[0], plain)


@pytest.mark.parametrize('size', [2, 4])
def test_it_does_not_matter_which_rank_saw_a_sample(size: int) -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 50, 8), rng.random(8, np.float32)) for _ in range(8)]
    results = []
    for owner in (lambda i: i % size, lambda i: 0, lambda i: size - 1 - i % size):
        ranks = [SampleHistory(distributed=True) for _ in range(size)]
        for i, (numbers, values) in enumerate(batches):
            ranks[owner(i)].update_of('a', numbers, values)
        exchange(ranks)
        assert_same_bits(ranks[0], ranks[-1])
        results.append(ranks[0].scores_of('a', np.arange(50)))
    assert results[1] == pytest.approx(results[0], rel=1e-6, nan_ok=True)
    assert (results[2] == results[0])[~np.isnan(results[0])].all()


def test_an_exchange_by_ranges_equals_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.integers(LOW, LOW + 500, 200), rng.random(200, np.float32)) for _ in range(3)]
    results = []
    for size in (1 << 20, 64, 1):
        monkeypatch.setattr(history_module, '_EXCHANGED_AT_ONCE', size)
        ranks = [SampleHistory(distributed=True) for _ in batches]
        for rank, (numbers, values) in zip(ranks, batches, strict=True):
            rank.update_of('a', numbers, values)
        exchange(ranks)
        results.append(ranks[0])
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_ranks_average_by_their_visits() -> None:
    ranks = [SampleHistory(distributed=True) for _ in range(2)]
    ranks[0].update([('a', 1)] * 3, [1.0] * 3)
    ranks[1].update([('a', 1)], [5.0])
    exchange(ranks)
    assert ranks[0].scores([('a', 1)]).tolist() == [2.0]


def test_one_rank_alone_equals_a_history_of_one_process() -> None:
    alone, rank = SampleHistory(0.9), SampleHistory(0.9, distributed=True)
    rng = np.random.default_rng(0)
    for step in range(40):
        numbers, values = rng.integers(0, 30, 8), rng.random(8, np.float32)
        alone.update_of('a', numbers, values)
        rank.update_of('a', numbers, values)
        assert rank.scores_of('a', np.arange(30)) == pytest.approx(alone.scores_of('a', np.arange(30)), nan_ok=True)
        assert len(rank) == len(alone)
        if step % 7 == 0:
            exchange([rank])


def test_an_exchange_empties_what_is_pending() -> None:
    rank = SampleHistory(distributed=True)
    rank.update([('a', 1)], [2.0])
    exchange([rank])
    assert rank.pending() == {}
    exchange([rank])
    assert rank.scores([('a', 1)]).tolist() == [2.0]


# -------------------------------------------------------------------- changed data sets, figures
# -------------------------------------------------------------------- checkpoints
def test_a_saved_history_shares_no_memory_with_the_running_one() -> None:
    history = SampleHistory()
    history.update([('a', 1)], [1.0])
    state = history.state_dict()
    loaded = SampleHistory()
    loaded.load_state_dict(state)
    history.update([('a', 1)], [9.0])
    loaded.update([('a', 1)], [5.0])
    assert state['data_sets']['a']['averages'].tolist() == [1.0]
    assert loaded.scores([('a', 1)]).tolist() == [3.0]


def test_a_distributed_history_saves_what_it_has_not_exchanged_too() -> None:
    rank, resumed = (SampleHistory(0.9, distributed=True) for _ in range(2))
    rank.update([('a', 1), ('b', 1)], [1.0, 5.0])
    exchange([rank])
    rank.update([('a', 1), ('c', 7)], [2.0, 6.0])
    wanted = [('a', 1), ('b', 1), ('c', 7), ('d', 0)]
    resumed.load_state_dict(through_disk(rank.state_dict()))
    assert resumed.scores(wanted).tolist()[:3] == rank.scores(wanted).tolist()[:3]
    assert resumed.pending() == {}


def test_a_state_goes_on_under_another_momentum() -> None:
    first, second = SampleHistory(), SampleHistory(momentum=0.0)
    first.update([('a', 1), ('a', 2)], [1.0, 2.0])
    second.load_state_dict(first.state_dict())
    second.update([('a', 2)], [6.0])
    assert second.scores([('a', 1), ('a', 2)]).tolist() == [1.0, 6.0]


@pytest.mark.parametrize('state', [{}, {'version': 2, 'data_sets': {}}, {'version': 1}])
def test_a_state_of_another_form_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="The history's"):
        SampleHistory().load_state_dict(state)


# -------------------------------------------------------------------- size and speed
@pytest.mark.parametrize(('kind', 'distributed'), [('dense', False), ('sparse', False), ('sparse', True)])
def test_samples_take_at_most_16_bytes_each(kind: str, distributed: bool) -> None:
    total = 300_000
    numbers = np.random.default_rng(0).permutation(total)
    numbers = numbers if kind == 'dense' else numbers * 9_000_000_000_001 + LOW
    history, most = SampleHistory(distributed=distributed), 0.0
    for start in range(0, total, 10_000):
        history.update_of('a', numbers[start : start + 10_000], np.ones(10_000))
        if start > total // 10:
            most = max(most, history_bytes(history) / (start + 10_000))
    assert len(history) == total
    assert most <= 16


@pytest.mark.slow
def test_ten_million_samples_fit_and_a_look_up_is_as_large_as_its_batch() -> None:
    total, part = 10_000_000, 2_500_000
    history = SampleHistory()
    for start in range(0, total, part):
        numbers = np.arange(start, start + part) * 7919 % total  # 7919 is prime to 10**7: each id once
        history.update_of('a', numbers, numbers)
    assert len(history) == total
    assert history_bytes(history) / total <= 16
    wanted = [('a', int(number)) for number in np.random.default_rng(0).integers(0, total, 256)]
    tracemalloc.start()
    scores = history.scores(wanted)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores.tolist() == [number for _, number in wanted]
    assert most < 100_000  # bytes: nothing is copied or compared that is as long as the history


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize('number', [1.0, '1', None, 2**63, LOW - 1])
def test_ids_that_are_no_integers_of_64_bits_are_refused(number: Any) -> None:
    history = SampleHistory()
    with pytest.raises((TypeError, OverflowError)):
        history.update([('a', 1), ('a', number)], [1.0, 2.0])
    with pytest.raises((TypeError, OverflowError)):
        history.scores([('a', 1), ('a', number)])
    assert len(history) == 0
