"""Each kind of draw against its definition, by enumeration and by frequencies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mm_sharp.samples.draw import BatchDrawer
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.schedule import CHOICES, Schedule, TrainingLength
from mm_sharp.samples.selection import inclusion_probabilities, sequential_sample, uniform_sample

SCORES = [0.0, 0.2, 0.5, 0.7, 1.0]
SIZES = [0.1 + 0.4 * score for score in SCORES]


def keys(count: int) -> list[tuple[str, int]]:
    return [('toys', number) for number in range(count)]


def history() -> SampleHistory:
    found = SampleHistory()
    found.update(keys(len(SCORES)), SCORES)
    return found


def set_probabilities(sizes: list[float], k: int) -> dict[tuple[int, ...], float]:
    """Of each set of k samples drawn one after the other: the sum over all orders."""
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(sizes)), k):
        probability, left = 1.0, sum(sizes)
        for row in order:
            probability *= sizes[row] / left
            left -= sizes[row]
        chosen = tuple(sorted(order))
        found[chosen] = found.get(chosen, 0.0) + probability
    return found


def sequential_inclusion(sizes: list[float], k: int) -> list[float]:
    sets = set_probabilities(sizes, k)
    return [sum(p for chosen, p in sets.items() if row in chosen) for row in range(len(sizes))]


def counts_of_sets(draws: int, kind: str, k: int) -> dict[tuple[int, ...], int]:
    generator, counts = torch.Generator().manual_seed(5), dict.fromkeys(itertools.combinations(range(5), k), 0)
    for _ in range(draws):
        if kind == 'sequential':
            chosen = sequential_sample(np.array(SIZES), k, generator)
        else:
            chosen = uniform_sample(5, k, generator)
        counts[tuple(chosen.tolist())] += 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'k'), [('sequential', 2), ('sequential', 3), ('uniform', 2)])
def test_every_set_comes_as_often_as_it_should(kind: str, k: int) -> None:
    draws = 20_000
    expected = set_probabilities(SIZES if kind == 'sequential' else [1.0] * 5, k)
    assert sum(expected.values()) == pytest.approx(1.0)
    for chosen, count in counts_of_sets(draws, kind, k).items():
        p = expected[chosen]
        assert abs(count / draws - p) <= 4.5 * math.sqrt(p * (1 - p) / draws)


def test_two_sets_worked_by_hand() -> None:
    """Sizes 1, 2, 3, two of three: {0, 1} is 1/6 * 2/5 + 2/6 * 1/4."""
    sets = set_probabilities([1.0, 2.0, 3.0], 2)
    assert sets[0, 1] == pytest.approx(1 / 15 + 1 / 12)
    assert sets[1, 2] == pytest.approx(2 / 6 * 3 / 4 + 3 / 6 * 2 / 3)


def test_drawn_one_after_the_other_samples_differ_less() -> None:
    """Which is why there are two kinds, and why the sequential one is not reweighted by K s / sum(s)."""
    exact, sequential = inclusion_probabilities(SCORES, 2, 0.1, 0.5), sequential_inclusion(SIZES, 2)
    assert exact == pytest.approx([2 * size / sum(SIZES) for size in SIZES])
    assert sum(sequential) == pytest.approx(2)
    assert exact.max() / exact.min() == pytest.approx(5)
    assert 1 < max(sequential) / min(sequential) < 4.2


@pytest.mark.parametrize('kind', CHOICES['draw'])
def test_the_drawer_draws_what_its_kind_says(kind: str) -> None:
    drawer, draws = BatchDrawer(history(), Schedule(0.4, 0.1, 0.5, draw=kind)), 4000
    generator, counts = torch.Generator().manual_seed(1), np.zeros(5)
    for _ in range(draws):
        draw = drawer.draw(keys(5), generator)
        assert len(set(draw.chosen.tolist())) == 2
        counts[draw.chosen] += 1
    expected = {
        'systematic': inclusion_probabilities(SCORES, 2, 0.1, 0.5),
        'sequential': np.array(sequential_inclusion(SIZES, 2)),
        'uniform': np.full(5, 0.4),
    }[kind]
    assert (np.abs(counts / draws - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws)).all()
    assert draw.pi.sum() == pytest.approx(2)
    assert np.isnan(draw.scores).all() == (kind == 'uniform')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['systematic', 'sequential'])
def test_frequencies_follow_the_ramp_over_the_epochs(kind: str) -> None:
    """Whole at first; then nearly uniform; then by the scores, as far as they are let."""
    drawer = BatchDrawer(history(), Schedule(0.4, 0.1, 0.5, ramp=0.5, whole_first_epoch=True, draw=kind))
    length, draws = TrainingLength(8, 3), 3000
    generator = torch.Generator().manual_seed(2)
    for epoch in (0, 1, 3, 4, 7):
        s_max = 0.1 + 0.4 * min(1.0, epoch / 4)
        sizes = [0.1 + (s_max - 0.1) * score for score in SCORES]
        counts = np.zeros(5)
        for _ in range(draws if epoch else 3):
            counts[drawer.draw(keys(5), generator, length.place(epoch)).chosen] += 1
        if epoch == 0:
            assert counts.tolist() == [3] * 5
            continue
        p = np.array(sequential_inclusion(sizes, 2) if kind == 'sequential' else [2 * s / sum(sizes) for s in sizes])
        assert (np.abs(counts / draws - p) <= 4.5 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize('kind', CHOICES['draw'])
@pytest.mark.parametrize('size', [1, 2, 5])
def test_a_batch_that_is_taken_whole(kind: str, size: int) -> None:
    draw = BatchDrawer(history(), Schedule(1.0, 0.1, 0.5, draw=kind)).draw(keys(size), torch.Generator())
    assert draw.chosen.tolist() == list(range(size))
    assert draw.pi.tolist() == [1.0] * size
