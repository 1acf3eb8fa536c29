"""Selection rules: frequencies, exact expectations, bounds, and hard inputs."""

from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_sharp.samples.selection import (
    Preference,
    horvitz_thompson_weights,
    inclusion_probabilities,
    normalised_scores,
    sample_count,
    systematic_choice,
    systematic_sample,
    top_k,
)

DRAWS = 4_000
INF, NAN = math.inf, math.nan


# -------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ('ratio', 'total', 'expected'),
    [(0.6, 32, 20), (0.5, 32, 16), (0.6, 5, 3), (0.07, 100, 7), (0.1, 30, 3), (1.0, 7, 7), (0.01, 1, 1), (1e-12, 9, 1)],
)
def test_sample_count_rounds_up(ratio: float, total: int, expected: int) -> None:
    assert sample_count(ratio, total) == expected


@given(st.integers(1, 1000), st.integers(1, 10_000))
def test_sample_count_equals_exact_arithmetic(permille: int, total: int) -> None:
    assert sample_count(permille / 1000, total) == math.ceil(Fraction(permille, 1000) * total)


# -------------------------------------------------------------------- top-k
def ranking(values: list[float]) -> list[int]:
    """The order that ``top_k`` promises, by Python's own comparisons."""
    return sorted(range(len(values)), key=lambda i: INF if math.isnan(values[i]) else -values[i])


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0, INF, -INF, NAN, -NAN]), st.floats(width=32))


@given(st.lists(numbers, min_size=1, max_size=40), st.data())
def test_top_k_takes_the_largest(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float64):
        assert top_k(torch.tensor(values, dtype=dtype), k).tolist() == sorted(ranking(values)[:k])


@pytest.mark.parametrize(
    ('values', 'k', 'expected'),
    [
        ([3.0], 1, [0]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([NAN, -1.0, 0.0, INF], 3, [1, 2, 3]),
        ([NAN, NAN], 1, [0]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([-5.0, -4.0, -9.0], 2, [0, 1]),
    ],
)
def test_top_k_on_cases_worked_by_hand(values: list[float], k: int, expected: list[int]) -> None:
    chosen = top_k(torch.tensor(values, requires_grad=True), k)
    assert chosen.tolist() == expected
    assert chosen.dtype == torch.int64


def test_top_k_never_loses_a_sample_where_the_strict_comparison_does() -> None:
    increases = torch.tensor([4.0, 3.0, 2.0, 1.0])
    strict = (increases > increases.sort(descending=True).values[1]).nonzero()
    assert len(strict) == 1
    assert len(top_k(increases, 2)) == 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_top_k_takes_low_precision(dtype: torch.dtype) -> None:
    assert top_k(torch.tensor([1.0, NAN, 3.0, 2.0], dtype=dtype), 2).tolist() == [2, 3]


# -------------------------------------------------------------------- inclusion probabilities
def by_redistribution(scores: list[float], k: int, s_min: float, s_max: float) -> list[float]:
    """The same probabilities by capping one after another, in exact fractions."""
    seen = [Fraction(x) for x in scores if not math.isnan(x)]
    low, high = (min(seen), max(seen)) if seen else (Fraction(0), Fraction(0))
    wide = Fraction(s_max) - Fraction(s_min)
    z = [Fraction(1) if math.isnan(x) or low == high else (Fraction(x) - low) / (high - low) for x in scores]
    sizes = [Fraction(s_min) + wide * part for part in z]
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in capped]
        unit = (k - len(capped)) / sum(sizes[i] for i in free) if free else Fraction(0)
        over = {i for i in free if sizes[i] * unit > 1}
        if not over:
            return [1.0 if i in capped else float(sizes[i] * unit) for i in range(len(sizes))]
        capped |= over


finite_scores = st.floats(0, 1e6)
any_scores = st.lists(
    st.one_of(finite_scores, st.sampled_from([0.0, 1.0, NAN, 3e38, 1e-45])),
    min_size=1,
    max_size=64,
)
bounds = st.tuples(st.floats(1e-3, 10), st.floats(1, 1e3)).map(lambda t: (t[0], t[0] * t[1]))


@given(st.lists(st.one_of(finite_scores, st.just(NAN)), min_size=1, max_size=20), bounds, st.data())
def test_probabilities_equal_exact_redistribution(
    scores: list[float], s: tuple[float, float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(scores)))
    pi = inclusion_probabilities(scores, k, *s)
    assert pi == pytest.approx(by_redistribution(scores, k, *s), rel=1e-9)


@given(any_scores, bounds, st.data())
def test_probabilities_keep_their_promises(scores: list[float], s: tuple[float, float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    pi = inclusion_probabilities(scores, k, *s)
    assert pi.dtype == np.float64
    assert ((pi > 0) & (pi <= 1)).all()
    assert math.fsum(pi.tolist()) == pytest.approx(k, rel=1e-14)
    # A cap brings the probabilities closer, so that the bound holds with and without.
    assert pi.max() / pi.min() <= s[1] / s[0] * (1 + 1e-12)
    order = np.argsort(np.nan_to_num(scores, nan=INF), kind='stable')
    assert (np.diff(pi[order]) >= 0).all()
    shuffle = np.array(data.draw(st.permutations(range(len(scores)))))
    assert inclusion_probabilities(np.array(scores)[shuffle], k, *s) == pytest.approx(pi[shuffle], rel=1e-12)


@pytest.mark.parametrize(
    ('scores', 'k', 'expected'),
    [
        ([0.0, 0.5, 1.0, NAN], 1, [0.3 / 2.95, 0.65 / 2.95, 1 / 2.95, 1 / 2.95]),
        ([2.0, 2.0, 2.0], 2, [2 / 3] * 3),
        ([NAN, NAN], 1, [0.5, 0.5]),
        ([2.0, NAN], 1, [0.5, 0.5]),
        ([5.0, 7.0, 9.0, 3e38], 1, [0.3 / 1.9] * 3 + [1 / 1.9]),
        ([0.0, 0.0, 0.0, 1.0], 2, [1 / 3, 1 / 3, 1 / 3, 1.0]),  # 2 / 1.9 > 1: capped
        ([0.0, 3.0], 2, [1.0, 1.0]),
        ([4.0], 1, [1.0]),
    ],
)
def test_probabilities_worked_by_hand(scores: list[float], k: int, expected: list[float]) -> None:
    assert inclusion_probabilities(scores, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('scores', 'preference', 'z'),
    [
        ([0.0, 1.0, 4.0, NAN], Preference(small=True), [1.0, 0.75, 0.0, 1.0]),
        ([0.0, 1.0, 2.0, 3.0, 400.0], Preference(quantile=0.75), [0.0, 1 / 3, 2 / 3, 1.0, 1.0]),
        ([0.0, 1.0, 2.0, 3.0, 400.0], Preference(True, 0.75), [1.0, 2 / 3, 1 / 3, 0.0, 0.0]),
        ([0.0, NAN, 2.0, 3e38], Preference(True, 0.5), [1.0, 1.0, 0.0, 0.0]),
        ([0.0, 1.0, 2.0], Preference(quantile=0.75), [0.0, 2 / 3, 1.0]),  # the quantile is 1.5, between two scores
        ([0.0, 0.0, 0.0, 5.0], Preference(True, 0.5), [1.0] * 4),  # clipped, they are all equal
        ([3.0, 3.0, NAN], Preference(small=True), [1.0] * 3),
        ([NAN, NAN], Preference(True, 0.5), [1.0] * 2),
        ([7.0], Preference(True, 0.5), [1.0]),
    ],
)
def test_preferences_worked_by_hand(scores: list[float], preference: Preference, z: list[float]) -> None:
    assert normalised_scores(np.array(scores), preference) == pytest.approx(z, rel=1e-12)
    sizes = [0.1 + 0.9 * share for share in z]
    pi = inclusion_probabilities(scores, 1, 0.1, 1.0, preference)
    assert pi == pytest.approx([size / sum(sizes) for size in sizes], rel=1e-12)


@given(any_scores, bounds, st.booleans(), st.floats(0.01, 1), st.data())
def test_with_every_preference_probabilities_keep_their_promises(
    scores: list[float], s: tuple[float, float], small: bool, quantile: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(scores)))
    pi = inclusion_probabilities(scores, k, *s, Preference(small, quantile))
    assert ((pi > 0) & (pi <= 1)).all()
    assert math.fsum(pi.tolist()) == pytest.approx(k, rel=1e-14)
    assert pi.max() / pi.min() <= s[1] / s[0] * (1 + 1e-12)
    known = ~np.isnan(scores)
    steps = np.diff(pi[known][np.argsort(np.array(scores)[known], kind='stable')])
    assert ((steps <= 0) if small else (steps >= 0)).all()
    assert (pi[~known] == pi.max()).all()


def test_equal_bounds_are_the_uniform_control() -> None:
    assert inclusion_probabilities([1.0, NAN, 3.0, 900.0], 3, 0.7, 0.7).tolist() == [0.75] * 4


def test_equal_scores_have_equal_probabilities_bit_for_bit() -> None:
    pi = inclusion_probabilities([0.1, 0.7, 0.1, 0.7, NAN, NAN, 0.1], 3)
    assert pi[0] == pi[2] == pi[6]
    assert pi[1] == pi[3] == pi[4] == pi[5]


def test_a_vanishing_ratio_of_bounds_divides_by_nothing() -> None:
    pi = inclusion_probabilities([0.0, 0.0, 1.0], 2, 5e-324, 1e308)
    assert pi.tolist() == [0.5, 0.5, 1.0]


# -------------------------------------------------------------------- systematic sampling
def score_kinds(n: int) -> dict[str, np.ndarray]:
    """Ties, zeros, unseen samples and one dominant score, for a batch of ``n``."""
    rng = np.random.default_rng(n)
    spread = rng.exponential(size=n)
    kinds = {'zeros': np.zeros(n), 'ties': np.floor(spread * 2), 'unseen': np.where(rng.random(n) < 0.3, NAN, spread)}
    dominant = spread.copy()
    dominant[n // 2] = 1e12
    return {**kinds, 'dominant': dominant}


CASES = [(n, kind, 0.3) for n in (1, 2, 5, 32) for kind in ('zeros', 'ties', 'unseen', 'dominant')]


@pytest.mark.slow
@pytest.mark.parametrize(('n', 'kind', 's_min'), [*CASES, (100, 'unseen', 0.3), (256, 'dominant', 0.001)])
def test_frequencies_match_the_probabilities(n: int, kind: str, s_min: float) -> None:
    """Within 4 standard errors; that they are exact, the enumeration below shows of small batches."""
    pi = inclusion_probabilities(score_kinds(n)[kind], sample_count(0.6, n), s_min)
    if n > 32:
        assert pi.max() == 1.0  # the cap takes part
    counts, generator = np.zeros(n), torch.Generator().manual_seed(n)
    for _ in range(DRAWS):
        counts[systematic_sample(pi, generator)] += 1
    # A sample that is (not) taken for certain has no error at all.
    error = np.sqrt(pi * (1 - pi) / DRAWS)
    assert (np.abs(counts / DRAWS - pi) <= 4 * error + 1e-12).all()


@settings(max_examples=200)
@given(any_scores, st.floats(1e-6, 1), st.integers(0, 2**32), st.data())
def test_every_draw_has_k_distinct_samples(scores: list[float], s_min: float, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    chosen = systematic_sample(inclusion_probabilities(scores, k, s_min), torch.Generator().manual_seed(seed))
    assert chosen.dtype == np.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == k
    assert chosen[0] >= 0
    assert chosen[-1] < len(scores)


@given(st.lists(st.booleans(), min_size=2, max_size=40).filter(any), st.integers(0, 99))
def test_certain_samples_are_always_taken(certain: list[bool], seed: int) -> None:
    pi = np.array(certain, dtype=float)
    chosen = systematic_sample(pi, torch.Generator().manual_seed(seed))
    assert chosen.tolist() == np.flatnonzero(certain).tolist()


@pytest.mark.parametrize('n', [1, 2, 7, 256, 1023, 1024, 5000])
@pytest.mark.parametrize('start', [0.0, 0.5, 1 - 2**-53])
def test_extreme_starts_lose_no_sample(n: int, start: float) -> None:
    for k in {1, sample_count(0.6, n), n}:
        pi = inclusion_probabilities(np.arange(n) / 3, k)
        for order in (np.arange(n), np.arange(n)[::-1]):
            assert len(set(systematic_choice(pi, order, start).tolist())) == k


def enumerated(pi: np.ndarray) -> list[tuple[Fraction, list[int]]]:
    """Every draw that systematic sampling can make of ``pi``, with its exact probability."""
    unit = 2**52
    draws = []
    for order in itertools.permutations(range(len(pi))):
        ends = itertools.accumulate(int(pi[i] * unit) for i in order)
        edges = sorted({0, unit, *(end % unit for end in ends)})
        for low, high in itertools.pairwise(edges):
            weight = Fraction(high - low, unit * math.factorial(len(pi)))
            # Probabilities that are no multiples of the unit move an edge by a few units: keep off the edges.
            draws.append((weight, systematic_choice(pi, order, (low + high) // 2 / unit).tolist()))
    return draws


@pytest.mark.parametrize(
    'pi', [[0.5, 0.25, 0.25], [1.0, 0.375, 0.125, 0.5], [0.0, 1.0], [0.75] * 4, [0.125, 0.625, 0.25, 0.5, 0.5]]
)
def test_expectations_over_all_draws_are_exact(pi: list[float]) -> None:
    draws = enumerated(np.array(pi))
    assert sum(weight for weight, _ in draws) == 1
    for i, probability in enumerate(pi):
        assert sum(weight for weight, chosen in draws if i in chosen) == Fraction(probability)


def test_the_reweighted_mean_is_exactly_unbiased() -> None:
    values, scores = [3.0, -1.0, 4.0, 1.5, -9.25], [0.0, 0.3, NAN, 2.0, 1.0]
    pi = inclusion_probabilities(scores, 3)
    expectation = 0.0
    for weight, chosen in enumerated(pi):
        weights = horvitz_thompson_weights(pi, chosen)
        expectation += float(weight) * float(weights @ np.array(values)[chosen])
    assert expectation == pytest.approx(np.mean(values), rel=1e-12)
    plain = sum(float(weight) * np.mean(np.array(values)[chosen]) for weight, chosen in enumerated(pi))
    assert abs(plain - np.mean(values)) > 0.1  # what the weights are for


def test_a_generator_restored_from_its_tensor_goes_on_with_the_same_draws() -> None:
    pi = inclusion_probabilities(np.arange(20.0), 7)
    generator = torch.Generator().manual_seed(3)
    systematic_sample(pi, generator)
    state = generator.get_state()
    expected = [systematic_sample(pi, generator).tolist() for _ in range(5)]
    assert len(set(map(tuple, expected))) > 1
    again = torch.Generator()
    again.set_state(state)
    assert [systematic_sample(pi, again).tolist() for _ in range(5)] == expected


def test_the_order_is_random_so_that_every_pair_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = {tuple(systematic_sample([0.5] * 4, generator).tolist()) for _ in range(300)}
    assert pairs == set(itertools.combinations(range(4), 2))


def test_drawing_leaves_the_global_generators_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    systematic_sample([0.5, 0.5], torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize(
    ('pi', 'message'),
    [
        ([0.5, 0.4], 'whose sum is an integer >= 1'),
        ([0.0, 0.0], 'whose sum is an integer >= 1'),
        ([1.5, 0.5], r'pi=.* is not allowed: it must be numbers in \[0, 1\]'),
        ([-0.5, 0.5, 1.0], 'pi='),
        ([NAN, 1.0], 'NaN'),
        ([], 'pi='),
    ],
)
def test_systematic_sample_refuses_bad_probabilities(pi: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        systematic_sample(pi, torch.Generator())


# -------------------------------------------------------------------- weights
def test_weights_of_the_uniform_draw_give_the_mean_of_the_drawn() -> None:
    pi = inclusion_probabilities(np.ones(10), 4)
    assert horvitz_thompson_weights(pi, [0, 3, 4, 9]) == pytest.approx(0.25)


def test_a_draw_runs_no_python_for_each_sample() -> None:
    """It takes a fraction of a millisecond for a thousand samples; what does not depend on the machine is the calls."""
    assert max(calls_of_a_draw(64), calls_of_a_draw(16384)) < 80


def calls_of_a_draw(size: int) -> int:
    """Functions of Python and C that are called in one draw of 0.6 of the samples."""
    scores, generator = np.random.default_rng(0).exponential(size=size), torch.Generator().manual_seed(0)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        pi = inclusion_probabilities(scores, size * 3 // 5)
        systematic_sample(pi, generator)
    finally:
        sys.setprofile(None)
    return sum('call' in event for event in calls)
