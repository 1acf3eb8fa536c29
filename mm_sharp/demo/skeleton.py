"""The skeleton: joint angles of a random pose, proportions of a body, and the positions of its points.

The tables are in ``body.yaml``. A pose maps every degree of freedom to an angle. Body frame, metres: x to the person's
own left, y up, z forward (right-handed), the pelvis at the origin. Heads are somewhat large, so that faces keep a few
pixels in small pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mm_sharp.demo.exact import Draws, Matrix, Vector, add, chain, rotate, rotation
from mm_sharp.demo.settings import SETTINGS, Settings

SIDES = ('left', 'right')
_ARM, _LEG = ('shoulder', 'elbow', 'wrist'), ('hip', 'knee', 'ankle')
_COCO_PARTS = ('eye', 'ear', 'shoulder', 'elbow', 'wrist', 'hip', 'knee', 'ankle')
#: The 17 keypoints of COCO and the 16 joints of MPII, in their orders.
COCO_KEYPOINTS = ('nose', *(f'{side}_{part}' for part in _COCO_PARTS for side in SIDES))
MPII_JOINTS = (
    'right_ankle', 'right_knee', 'right_hip', 'left_hip', 'left_knee', 'left_ankle', 'pelvis', 'thorax',
    'upper_neck', 'head_top', 'right_wrist', 'right_elbow', 'right_shoulder', 'left_shoulder',
    'left_elbow', 'left_wrist',
)  # fmt: skip

Pose = dict[str, int]  # angle in units of 1/4096 turn for each degree of freedom
Ranges = dict[str, tuple[int, int]]
Points = dict[str, Vector]

TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name('body.yaml').read_text(encoding='utf-8'))
FAMILIES: dict[str, Ranges] = TABLES['families']
_NEUTRAL: Ranges = {**TABLES['central'], **TABLES['sided']}
#: All degrees of freedom, in the order in which they are drawn, and their names without the side.
DEGREES_OF_FREEDOM = {
    **{dof: dof for dof in TABLES['central']},
    **{f'{side}_{dof}': dof for side in SIDES for dof in TABLES['sided']},
}


def family_ranges(family: str) -> Ranges:
    """The range of every degree of freedom in a pose family, degrees."""
    own = FAMILIES[family]
    return {dof: own.get(dof) or own.get(plain) or _NEUTRAL[plain] for dof, plain in DEGREES_OF_FREEDOM.items()}


def draw_pose(draws: Draws, settings: Settings = SETTINGS) -> Pose:
    """A random pose: a family by its weight, then every angle uniformly in the family's range."""
    ranges = family_ranges(draws.weighted(settings.pose_weights))
    pose = {dof: draws.angle(bounds) for dof, bounds in ranges.items()}
    return mirror(pose) if draws.chance(0.5) else pose


def mirror(pose: Pose) -> Pose:
    """The pose seen in a mirror: sides swapped, turns and tilts reversed."""
    swapped = dict(pose)
    for dof in TABLES['sided']:
        swapped[f'left_{dof}'], swapped[f'right_{dof}'] = pose[f'right_{dof}'], pose[f'left_{dof}']
    for dof in ('root_tilt', 'waist_side', 'waist_twist', 'head_yaw', 'head_roll'):
        swapped[dof] = -pose[dof]
    return swapped


class Proportions(NamedTuple):
    """Lengths in metres; ``girth`` multiplies the thickness of every part."""

    torso: float = 0.50
    neck: float = 0.09
    head: float = 0.26
    shoulder: float = 0.175
    hip: float = 0.10
    upper_arm: float = 0.28
    forearm: float = 0.25
    hand: float = 0.09
    thigh: float = 0.42
    shin: float = 0.41
    foot: float = 0.19
    girth: float = 1.0


def draw_proportions(draws: Draws) -> Proportions:
    """A random body: limbs, trunk, breadth and girth vary on their own."""
    mean = Proportions()
    arms, legs, breadth = draws.uniform((0.9, 1.1)), draws.uniform((0.88, 1.12)), draws.uniform((0.88, 1.15))
    return Proportions(
        torso=mean.torso * draws.uniform((0.9, 1.1)),
        neck=mean.neck * draws.uniform((0.85, 1.15)),
        head=mean.head * draws.uniform((0.9, 1.15)),
        shoulder=mean.shoulder * breadth,
        hip=mean.hip * breadth * draws.uniform((0.92, 1.1)),
        upper_arm=mean.upper_arm * arms,
        forearm=mean.forearm * arms,
        hand=mean.hand * arms,
        thigh=mean.thigh * legs,
        shin=mean.shin * legs,
        foot=mean.foot * draws.uniform((0.9, 1.1)),
        girth=draws.uniform((0.85, 1.25)),
    )


def body_points(body: Proportions, pose: Pose) -> Points:
    """Positions in the body frame, metres, of all keypoints and of the points that drawing needs."""
    root = chain(rotation('x', pose['root_lean']), rotation('z', -pose['root_tilt']))
    bend, tilt, twist = (pose[f'waist_{dof}'] for dof in ('bend', 'side', 'twist'))
    chest = chain(root, rotation('x', bend), rotation('z', -tilt), rotation('y', twist))
    waist = rotate(root, (0.0, 0.4 * body.torso, 0.0))
    thorax = add(waist, rotate(chest, (0.0, 0.6 * body.torso, 0.0)))
    points: Points = {
        'pelvis': (0.0, 0.0, 0.0),
        'waist': waist,
        'thorax': thorax,
        'upper_neck': add(thorax, rotate(chest, (0.0, body.neck, 0.0))),
        # The middle line of the shirt's front, just outside of the trunk's surface.
        'collar': add(thorax, rotate(chest, (0.0, -0.05, 0.085 * body.girth))),
        'belly': add(waist, rotate(chest, (0.0, 0.0, 0.115 * body.girth))),
        'buckle': rotate(root, (0.0, 0.05, 0.115 * body.girth)),
    }
    _add_head(points, body, pose, chest)
    for side, sign in zip(SIDES, (1, -1), strict=True):
        arm, leg = ([f'{side}_{joint}' for joint in joints] for joints in (_ARM, _LEG))
        shoulder = add(thorax, rotate(chest, (sign * body.shoulder, -0.03, 0.0)))
        forearm = _add_limb(points, pose, chest, arm, shoulder, (body.upper_arm, body.forearm))
        points[f'{side}_hand'] = add(points[arm[2]], rotate(forearm, (0.0, -body.hand, 0.0)))
        hip = rotate(root, (sign * body.hip, 0.0, 0.0))
        shin = _add_limb(points, pose, root, leg, hip, (body.thigh, body.shin))
        foot = chain(shin, rotation('x', -pose[f'{side}_ankle_flexion']))
        for end, forward in (('heel', -0.2), ('toe', 0.8)):
            points[f'{side}_{end}'] = add(points[leg[2]], rotate(foot, (0.0, -0.05, forward * body.foot)))
    return points


def _add_head(points: Points, body: Proportions, pose: Pose, chest: Matrix) -> None:
    pitch, roll, yaw = pose['head_pitch'], pose['head_roll'], pose['head_yaw']
    frame = chain(chest, rotation('y', yaw), rotation('x', pitch), rotation('z', -roll))
    for name, (x, y, z) in TABLES['head'].items():
        points[name] = add(points['upper_neck'], rotate(frame, (x * body.head, y * body.head, z * body.head)))


def _add_limb(
    points: Points, pose: Pose, base: Matrix, joints: list[str], start: Vector, lengths: tuple[float, float]
) -> Matrix:
    """Three joints of an arm or a leg, whose first lies at ``start``; returns the frame of its lower segment."""
    first, second, third = joints
    sign = 1 if first.startswith('left') else -1
    flexion, abduction, twist = (pose[f'{first}_{dof}'] for dof in ('flexion', 'abduction', 'twist'))
    upper = chain(base, rotation('x', -flexion), rotation('z', sign * abduction), rotation('y', sign * twist))
    bend = pose[f'{second}_flexion']
    lower = chain(upper, rotation('x', bend if second.endswith('knee') else -bend))
    points[first], points[second] = start, add(start, rotate(upper, (0.0, -lengths[0], 0.0)))
    points[third] = add(points[second], rotate(lower, (0.0, -lengths[1], 0.0)))
    return lower
