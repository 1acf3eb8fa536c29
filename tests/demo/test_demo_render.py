"""The capsule renderer against brute force, and its depth order, patterns and light."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mm_sharp.demo.render import EMPTY, Camera, Capsule, Layer, Light, Paint, draw_capsule, draw_card
from mm_sharp.demo.scene import upsample

SIZE = 48
CAMERA = Camera(0, 0, 0, 4.0, focal=100.0, centre=(24.0, 24.0))
FLAT = Light((0.0, 0.0, -1.0), ambient=1.0, diffuse=0.0)
RED = Paint((200, 0, 0))


def draw(*capsules: Capsule, light: Light = FLAT) -> Layer:
    layer = Layer.empty(SIZE, SIZE)
    for capsule in capsules:
        draw_capsule(layer, capsule, CAMERA, light)
    return layer


def ball(x: float, z: float, radius: float, part: int, paint: Paint = RED) -> Capsule:
    return Capsule((x, 0.0, z), (x, 0.0, z), (radius, radius), part, paint)


def discs_between(capsule: Capsule, camera: Camera, extra: float, steps: int = 400) -> np.ndarray:
    """Brute force: the outline is the union of many discs between the two ends, ``extra`` pixels wider."""
    v, u = np.mgrid[:SIZE, :SIZE]
    covered = np.zeros((SIZE, SIZE), bool)
    ends = [camera.project(point) for point in (capsule.first, capsule.second)]
    radii = [camera.focal * r / p[2] for r, p in zip(capsule.radii, (capsule.first, capsule.second), strict=True)]
    for t in np.linspace(0, 1, steps):
        x, y, r = (a + t * (b - a) for a, b in (*zip(*ends, strict=True), radii))
        covered |= (u - x) ** 2 + (v - y) ** 2 <= (r + extra) ** 2
    return covered


coordinate = st.floats(-0.8, 0.8)


@settings(max_examples=60)
@given(coordinate, coordinate, coordinate, coordinate, st.floats(2.5, 6), st.floats(0.02, 0.4), st.floats(0.02, 0.4))
def test_outline_is_the_union_of_discs(
    x0: float, y0: float, x1: float, y1: float, z1: float, r0: float, r1: float
) -> None:
    capsule = Capsule((x0, y0, 4.0), (x1, y1, z1), (r0, r1), 7, RED)
    mask = draw(capsule).mask
    assert not (discs_between(capsule, CAMERA, -1e-6) & ~mask).any()
    assert not (mask & ~discs_between(capsule, CAMERA, 0.01)).any()  # closes the gaps between 400 discs


def test_outline_off_the_image_is_clipped_or_empty() -> None:
    assert not draw(ball(3.0, 4.0, 0.2, 1)).mask.any()
    edge = draw(ball(-0.96, 4.0, 0.2, 1)).mask  # centre at u = 0
    assert edge[:, 0].sum() == 11
    assert edge[24].sum() == 6


def test_ball_has_the_depth_of_its_surface() -> None:
    layer = draw(ball(0.0, 4.0, 0.4, 3))
    assert layer.depth[24, 24] == pytest.approx(3.6)
    assert layer.depth[24, 29] == pytest.approx(4.0 - math.sqrt(0.4**2 - 0.2**2), abs=0.01)
    assert layer.depth[0, 0] == math.inf
    assert (layer.part[24, 24], layer.part[0, 0]) == (3, EMPTY)


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_nearer_capsule_hides_farther_one_in_either_order(order: tuple[int, int]) -> None:
    capsules = (ball(0.0, 4.0, 0.4, 1), ball(0.1, 3.0, 0.15, 2, Paint((0, 0, 90))))
    layer = draw(*(capsules[i] for i in order))
    assert layer.part[24, 27] == 2
    assert layer.colour[24, 27].tolist() == [0, 0, 90]
    assert layer.part[24, 16] == 1


def test_balls_that_cross_meet_where_their_surfaces_do() -> None:
    layer = draw(ball(-0.1, 4.0, 0.3, 1), ball(0.1, 4.0, 0.3, 2))
    assert (layer.part[24, 18:24] == 1).all()
    assert (layer.part[24, 25:31] == 2).all()


def test_pattern_cut_and_light() -> None:
    paint = Paint((100, 0, 0), (0, 100, 0), rings=4, cut=0.75, end=(0, 0, 100))
    bar = Capsule((-0.8, 0.0, 4.0), (0.8, 0.0, 4.0), (0.1, 0.1), 0, paint)
    row = draw(bar).colour[24]
    assert [row[u].argmax() for u in (8, 18, 28, 40)] == [0, 1, 0, 2]
    lit = draw(ball(0.0, 4.0, 0.4, 0), light=Light((1.0, 0.0, 0.0), 0.5, 0.5)).colour[24, :, 0]
    assert lit[16] == 100  # turned away: ambient only
    assert 170 < lit[33] < 200
    assert (np.diff(lit[24:34].astype(int)) >= 0).all()


def test_card_covers_only_what_is_behind_it() -> None:
    layer = draw(ball(0.0, 4.0, 0.4, 1))
    draw_card(layer, (-5, 20, 24, 90), 3.8, 9, (1, 2, 3))
    assert layer.part[24, 23] == 1  # the ball bulges to 3.6 m
    assert layer.part[40, 0] == 9
    assert layer.part[40, 24] == EMPTY
    draw_card(layer, (0, 0, SIZE, SIZE), 1.0, 5, (1, 2, 3))
    assert (layer.part == 5).all()


@given(st.integers(2, 9), st.integers(2, 9))
def test_upsampling_keeps_corners_and_planes(rows: int, columns: int) -> None:
    assume(rows != columns)
    y, x = np.mgrid[:rows, :columns]
    plane = 3.0 * y / (rows - 1) + 5.0 * x / (columns - 1)
    big = upsample(plane[:, :, None], 31, 21)[:, :, 0]
    v, u = np.mgrid[:31, :21]
    np.testing.assert_allclose(big, 3.0 * v / 30 + 5.0 * u / 20, atol=1e-9)
