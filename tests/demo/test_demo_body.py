"""Skeleton, poses and camera: limits, lengths, sides, projection."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_sharp.demo.body import (
    COCO_KEYPOINTS,
    DEGREES_OF_FREEDOM,
    FAMILIES,
    PARTS,
    Pose,
    Proportions,
    body_capsules,
    body_points,
    draw_outfit,
    draw_pose,
    draw_proportions,
    family_ranges,
    mirror,
    own_parts,
)
from mm_sharp.demo.exact import TURN, Draws, angle_units
from mm_sharp.demo.render import Camera
from mm_sharp.demo.settings import SETTINGS

seeds = st.integers(0, 2**32 - 1)
REST: Pose = dict.fromkeys(DEGREES_OF_FREEDOM, 0)
# Anatomical limits, degrees; those without a side hold for both.
LIMITS = {
    'root_lean': (-12, 20), 'root_tilt': (-10, 10), 'waist_bend': (-15, 70), 'waist_side': (-20, 20),
    'waist_twist': (-30, 30), 'head_pitch': (-30, 35), 'head_yaw': (-50, 50), 'head_roll': (-15, 15),
    'shoulder_flexion': (-45, 175), 'shoulder_abduction': (2, 140), 'shoulder_twist': (-60, 50),
    'elbow_flexion': (0, 140), 'hip_flexion': (-25, 110), 'hip_abduction': (-8, 45), 'hip_twist': (-15, 30),
    'knee_flexion': (0, 130), 'ankle_flexion': (-25, 25),
}  # fmt: skip
BONES = {
    'upper_arm': ('shoulder', 'elbow'),
    'forearm': ('elbow', 'wrist'),
    'hand': ('wrist', 'hand'),
    'thigh': ('hip', 'knee'),
    'shin': ('knee', 'ankle'),
}


def test_families_stay_within_anatomical_limits() -> None:
    assert set(SETTINGS.pose_weights) == set(FAMILIES)
    for family, own in FAMILIES.items():
        assert set(own) <= {*DEGREES_OF_FREEDOM, *DEGREES_OF_FREEDOM.values()}, family
        ranges = family_ranges(family)
        assert set(ranges) == set(DEGREES_OF_FREEDOM)
        for dof, (low, high) in ranges.items():
            least, most = LIMITS[DEGREES_OF_FREEDOM[dof]]
            assert least <= low <= high <= most, f'{family}: {dof}'


@given(seeds)
def test_drawn_poses_and_their_mirrors_are_within_limits(seed: int) -> None:
    pose = draw_pose(Draws(seed, 0, 0))
    for one in (pose, mirror(pose)):
        for dof, plain in DEGREES_OF_FREEDOM.items():
            low, high = LIMITS[plain]
            assert angle_units(low) <= one[dof] <= angle_units(high), dof
    assert mirror(mirror(pose)) == pose


@given(seeds)
def test_bones_keep_their_lengths_in_any_pose(seed: int) -> None:
    draws = Draws(seed, 0, 0)
    body = draw_proportions(draws)
    points = body_points(body, draw_pose(draws))
    for side in ('left', 'right'):
        for bone, (start, end) in BONES.items():
            length = math.dist(points[f'{side}_{start}'], points[f'{side}_{end}'])
            assert length == pytest.approx(getattr(body, bone), abs=1e-5)
    assert math.dist(points['left_hip'], points['right_hip']) == pytest.approx(2 * body.hip, abs=1e-5)
    assert math.dist(points['upper_neck'], points['head_top']) == pytest.approx(body.head, abs=1e-5)
    assert math.dist(points['thorax'], points['upper_neck']) == pytest.approx(body.neck, abs=1e-5)


@given(seeds)
def test_mirrored_pose_is_the_mirrored_body(seed: int) -> None:
    pose = draw_pose(Draws(seed, 0, 0))
    points, mirrored = (body_points(Proportions(), p) for p in (pose, mirror(pose)))
    for name, (x, y, z) in points.items():
        if name.startswith(('left_', 'right_')):
            name = name.replace('left', 'L').replace('right', 'left').replace('L', 'right')
        np.testing.assert_allclose(mirrored[name], (-x, y, z), atol=1e-6)


def test_rest_pose_stands_upright_and_looks_ahead() -> None:
    points = body_points(Proportions(), REST)
    assert points['left_shoulder'][0] > 0 > points['right_shoulder'][0]
    assert points['nose'][2] > points['left_ear'][2]
    assert points['left_toe'][2] > points['left_heel'][2]
    heights = [points[n][1] for n in ('head_top', 'thorax', 'pelvis', 'left_knee', 'left_ankle')]
    assert heights == sorted(heights, reverse=True)
    assert 1.5 < heights[0] - points['left_toe'][1] < 1.9


@pytest.mark.parametrize(
    ('dof', 'point', 'axis', 'sign'),
    [
        ('left_shoulder_flexion', 'left_wrist', 2, 1),  # the arm goes forward
        ('left_shoulder_abduction', 'left_wrist', 0, 1),  # away from the body, to its left
        ('right_shoulder_abduction', 'right_wrist', 0, -1),
        ('left_elbow_flexion', 'left_wrist', 2, 1),
        ('right_hip_flexion', 'right_knee', 2, 1),
        ('right_hip_abduction', 'right_knee', 0, -1),
        ('left_knee_flexion', 'left_ankle', 2, -1),  # the shin goes back
        ('waist_bend', 'thorax', 2, 1),
        ('waist_side', 'thorax', 0, 1),
        ('waist_twist', 'left_shoulder', 2, -1),  # turning to the left takes the left shoulder back
        ('head_yaw', 'nose', 0, 1),
        ('head_pitch', 'nose', 1, -1),
        ('root_lean', 'head_top', 2, 1),
        ('root_tilt', 'head_top', 0, 1),
    ],
)
def test_positive_angles_move_the_body_as_documented(dof: str, point: str, axis: int, sign: int) -> None:
    rest = body_points(Proportions(), REST)
    moved = body_points(Proportions(), {**REST, dof: angle_units(20)})
    assert sign * (moved[point][axis] - rest[point][axis]) > 0.01


def test_every_keypoint_has_a_position() -> None:
    assert len(COCO_KEYPOINTS) == 17
    assert set(COCO_KEYPOINTS) <= set(body_points(Proportions(), REST))


def test_body_parts_are_on_their_own_side() -> None:
    points = body_points(Proportions(), REST)
    names = {number: name for name, number in PARTS.items()}
    capsules = body_capsules(points, Proportions(), draw_outfit(Draws(0, 0, 0)))
    sided = [(names[c.part], c.first[0]) for c in capsules if names[c.part].startswith(('left', 'right'))]
    assert len(sided) >= 18
    assert all((x > 0) == name.startswith('left') for name, x in sided)
    for keypoint in COCO_KEYPOINTS:
        parts, depth = own_parts(keypoint)
        assert parts
        assert 0.02 < depth < 0.2


def test_two_tone_clothes_are_darker_on_the_right_and_off_by_default() -> None:
    for chance, expected in ((0.0, False), (1.0, True)):
        outfit = draw_outfit(Draws(3, 0, 0), replace(SETTINGS, two_tone_chance=chance))
        for part in ('upper_arm', 'thigh'):
            left, right = (outfit.paints[f'{side}_{part}'] for side in ('left', 'right'))
            assert (sum(right.base) < sum(left.base)) == expected
    assert SETTINGS.two_tone_chance == 0.0


def reference_projection(camera: Camera, point: np.ndarray) -> tuple[float, float]:
    """A pinhole camera by the textbook: its position on a sphere, three axes, perspective division."""
    azimuth, elevation, roll = (2 * math.pi * units / TURN for units in (camera.azimuth, camera.elevation, camera.roll))
    outward = np.array(
        [math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)]
    )
    position = camera.distance * outward
    right = np.cross(-outward, (0.0, 1.0, 0.0))
    right /= np.linalg.norm(right)
    up = np.cross(right, -outward)
    rolled_right = math.cos(roll) * right - math.sin(roll) * up
    rolled_up = math.sin(roll) * right + math.cos(roll) * up
    ray = point - position
    depth = -outward @ ray
    u = camera.centre[0] + camera.focal * (rolled_right @ ray) / depth
    v = camera.centre[1] - camera.focal * (rolled_up @ ray) / depth
    return u, v


@given(
    st.integers(-TURN, TURN),
    st.integers(-700, 700),
    st.integers(-300, 300),
    st.tuples(*[st.floats(-0.9, 0.9)] * 3),
)
def test_projection_is_that_of_a_pinhole_camera(
    azimuth: int, elevation: int, roll: int, point: tuple[float, float, float]
) -> None:
    camera = Camera(azimuth, elevation, roll, 3.5, 250.0, (80.0, 100.0))
    u, v = camera.project(camera.view({'p': point})['p'])
    assert (u, v) == pytest.approx(reference_projection(camera, np.array(point)), abs=1e-3)


def test_left_is_on_the_right_of_a_picture_of_somebody_who_faces_the_camera() -> None:
    points = body_points(Proportions(), REST)
    for azimuth, sign in ((0, 1), (angle_units(180), -1)):
        camera = Camera(azimuth, 0, 0, 4.0, focal=100.0)
        seen = camera.view(points)
        left, right = (camera.project(seen[f'{side}_shoulder'])[0] for side in ('left', 'right'))
        assert sign * (left - right) > 5
        assert camera.project(seen['nose'])[1] < camera.project(seen['pelvis'])[1]


@settings(max_examples=30)
@given(seeds, st.floats(20, 200), st.floats(20, 200))
def test_framing_fits_the_points_into_the_frame(seed: int, width: float, height: float) -> None:
    draws = Draws(seed, 0, 0)
    camera = Camera(draws.angle((-180, 180)), 0, 0, 3.0)
    seen = camera.view(body_points(Proportions(), draw_pose(draws)))
    framed = camera.framing(seen, (width, height), (40.0, 50.0))
    flat = np.array([framed.project(point) for point in seen.values()])
    extent = flat.max(axis=0) - flat.min(axis=0)
    assert max(extent[0] / width, extent[1] / height) == pytest.approx(1.0)
    np.testing.assert_allclose((flat.max(axis=0) + flat.min(axis=0)) / 2, (40.0, 50.0), atol=1e-6)
