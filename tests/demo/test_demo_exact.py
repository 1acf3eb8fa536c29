"""Arithmetic and draws that must be the same on every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_sharp.demo.exact import TURN, Draws, angle_units, chain, rotate, rotation

angles = st.integers(-3 * TURN, 3 * TURN)


def sine(units: int) -> float:
    return rotation('z', units)[1][0]


def cosine(units: int) -> float:
    return rotation('z', units)[0][0]


def test_sine_table_is_safe_from_the_last_bit_of_any_libm() -> None:
    """No value is so near to the boundary between two table entries that another libm could round it away."""
    for k in range(TURN):
        scaled = math.sin(2 * math.pi * k / TURN) * 2**24
        distance = abs(scaled - math.floor(scaled) - 0.5) / 2**24
        assert distance > 1e-12 or sine(k) in (0.0, 1.0, -1.0)
        assert abs(sine(k) - math.sin(2 * math.pi * k / TURN)) <= 2**-25 + 1e-15
    digest = hashlib.sha256(np.array([sine(k) for k in range(TURN)]).astype('<f8').tobytes()).hexdigest()
    assert digest[:16] == 'e4f2465e86e61b59'


@given(angles)
def test_sine_and_cosine_are_those_of_the_angle(units: int) -> None:
    assert sine(units) == pytest.approx(math.sin(units * 2 * math.pi / TURN), abs=1e-7)
    assert cosine(units) == pytest.approx(math.cos(units * 2 * math.pi / TURN), abs=1e-7)
    assert sine(-units) == -sine(units)


@given(st.sampled_from('xyz'), angles, st.sampled_from('xyz'), angles)
def test_chained_rotations_are_orthonormal_and_compose(first: str, a: int, second: str, b: int) -> None:
    product = np.array(chain(rotation(first, a), rotation(second, b)))
    np.testing.assert_allclose(product @ product.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(product) == pytest.approx(1.0, abs=1e-6)
    vector = (0.3, -1.2, 0.5)
    one_by_one = rotate(rotation(first, a), rotate(rotation(second, b), vector))
    np.testing.assert_allclose(product @ np.array(vector), one_by_one, atol=1e-12)


def test_rotation_is_right_handed() -> None:
    quarter = angle_units(90)
    assert rotate(rotation('z', quarter), (1, 0, 0)) == (0, 1, 0)
    assert rotate(rotation('x', quarter), (0, 1, 0)) == (0, 0, 1)
    assert rotate(rotation('y', quarter), (0, 0, 1)) == (1, 0, 0)


def test_draws_depend_on_seed_split_and_index() -> None:
    streams = {tuple(Draws(*words).unit() for _ in range(1)) for words in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(streams) == 4
    assert Draws(3, 1, 2).array(5).tolist() == Draws(3, 1, 2).array(5).tolist()


def test_draws_are_the_recorded_ones() -> None:
    """The bits of PCG64 are part of the data set: a change of numpy's would change every picture."""
    draws = Draws(0, 0, 0)
    assert [draws.unit() for _ in range(3)] == [0.6369616873214543, 0.2697867137638703, 0.04097352393619469]


@given(st.integers(0, 2**32 - 1), st.integers(-50, 50), st.integers(0, 60))
def test_draws_stay_in_their_bounds(seed: int, low: int, span: int) -> None:
    draws = Draws(seed, 0, 0)
    high = low + span
    assert low <= draws.integer(low, high) <= high
    assert low <= draws.uniform((low, high)) <= high
    assert angle_units(low) <= draws.angle((low, high)) <= angle_units(high)
    assert draws.weighted({'never': 0, 'always': 3}) == 'always'
    assert draws.chance(1.0)
    assert not draws.chance(0.0)


def test_integers_and_weights_are_drawn_evenly() -> None:
    draws = Draws(1, 0, 0)
    counts = np.bincount([draws.integer(0, 3) for _ in range(4000)], minlength=4)
    assert counts.min() > 850
    names = [draws.weighted({'one': 1, 'three': 3}) for _ in range(4000)]
    assert 2800 < names.count('three') < 3200


@pytest.mark.parametrize('words', [(-1, 0, 0), (2**32, 0, 0), (0, 0, -1), (0, 2**32, 0)])
def test_draws_reject_words_that_could_collide(words: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r'must be a whole number in \[0, 4294967295\]'):
        Draws(*words)
