"""A body: its proportions, the points of a random pose, and the clothed capsules that it is drawn of.

The tables are in ``body.yaml``. A pose maps every degree of freedom to an angle. Body frame, metres: x to the person's
own left, y up, z forward (right-handed), the pelvis at the origin. Heads are somewhat large, so that faces keep a few
pixels in small pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mm_sharp.demo.exact import Draws, Matrix, Vector, add, chain, rotate, rotation
from mm_sharp.demo.render import Capsule, Colour, Paint
from mm_sharp.demo.settings import SETTINGS, Settings

SIDES = ('left', 'right')
_ARM, _LEG = ('shoulder', 'elbow', 'wrist'), ('hip', 'knee', 'ankle')
_COCO_PARTS = ('eye', 'ear', 'shoulder', 'elbow', 'wrist', 'hip', 'knee', 'ankle')
#: The 17 keypoints of COCO, in their order.
COCO_KEYPOINTS = ('nose', *(f'{side}_{part}' for part in _COCO_PARTS for side in SIDES))
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
SKIN_TONES: tuple[Colour, ...] = (
    (243, 205, 178), (226, 178, 144), (198, 145, 108), (160, 108, 76), (115, 74, 52), (84, 56, 42),
)  # fmt: skip
HAIR_COLOURS: tuple[Colour, ...] = (
    (30, 24, 22), (70, 45, 30), (120, 76, 40), (186, 148, 88), (150, 66, 34), (150, 150, 150),
)  # fmt: skip
_ROWS: list[tuple[str, str, str, float, float, str]] = TABLES['capsules']
PARTS: dict[str, int] = {name: number for number, name in enumerate(dict.fromkeys(row[0] for row in _ROWS))}


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


def own_parts(keypoint: str) -> tuple[frozenset[int], float]:
    """Numbers of the parts that show a COCO keypoint, and the allowed depth under them (metres)."""
    side, _, plain = keypoint.rpartition('_')
    names, depth = TABLES['own_parts'][plain]
    return frozenset(PARTS[name.replace('*', side)] for name in names), depth


class Outfit(NamedTuple):
    """Colours and cuts of one person."""

    paints: dict[str, Paint]  # of each part
    missing: frozenset[str]  # ends of the capsules that are not drawn


def draw_colour(draws: Draws, low: int = 20, high: int = 235) -> Colour:
    """A random colour."""
    return (draws.integer(low, high), draws.integer(low, high), draws.integer(low, high))


def _garment(draws: Draws, settings: Settings) -> tuple[Paint, Paint]:
    paint = Paint(draw_colour(draws), draw_colour(draws))
    if draws.chance(settings.pattern_chance):
        rings, strips = draws.choice(((5, 0), (0, 4), (6, 4), (3, 0)))
        paint = paint._replace(rings=rings, strips=strips)
    if not draws.chance(settings.two_tone_chance):
        return paint, paint
    return paint, paint._replace(base=_darker(paint.base, 5, 9), other=_darker(paint.other, 5, 9))


def _darker(colour: Colour, numerator: int, denominator: int) -> Colour:
    red, green, blue = (value * numerator // denominator for value in colour)
    return (red, green, blue)


def draw_outfit(draws: Draws, settings: Settings = SETTINGS) -> Outfit:
    """Random colours, patterns and lengths."""
    jitter = draws.integer(-12, 12)
    red, green, blue = (min(value + jitter, 255) for value in draws.choice(SKIN_TONES))
    bare, skin, shadow = (red, green, blue), Paint((red, green, blue)), Paint(_darker((red, green, blue), 3, 4))
    hair, shoes, front = draws.choice(HAIR_COLOURS), draw_colour(draws, 10, 200), draw_colour(draws)
    shirts, trousers = _garment(draws, settings), _garment(draws, settings)
    sleeve, leg = draws.choice((0.1, 0.6, 1.3, 1.9)), draws.choice((0.7, 1.1, 1.9, 1.9))  # segments that are covered
    missing = {'hair_end': not draws.chance(0.35), 'hair_high': draws.chance(0.1)}
    paints = {'chest': shirts[0], 'belly': _cut(shirts[0], 0.6, trousers[0].base), 'pelvis': trousers[0], 'neck': skin}
    paints |= {'shoulders': shirts[0], 'front': Paint(front), 'face': skin, 'nose': shadow, 'hair': Paint(hair)}
    paints['mouth'] = Paint((150, 50, 55))
    for side, shirt, cloth in zip(SIDES, shirts, trousers, strict=True):
        sided = {'flank': _cut(shirt, 0.88, cloth.base), 'eye': Paint((15, 15, 25)), 'ear': shadow, 'hand': skin}
        sided |= {'upper_arm': _cut(shirt, sleeve, bare), 'forearm': _cut(shirt, sleeve - 1, bare)}
        sided |= {'thigh': _cut(cloth, leg, bare), 'shin': _cut(cloth, leg - 1, bare), 'foot': Paint(shoes)}
        paints |= {f'{side}_{part}': paint for part, paint in sided.items()}
    return Outfit(paints, frozenset(end for end, is_missing in missing.items() if is_missing))


def body_capsules(points: Points, body: Proportions, outfit: Outfit) -> list[Capsule]:
    """The capsules of a person whose points are given in camera coordinates."""
    units, points = {'girth': body.girth, 'head': body.head, 'metres': 1.0}, dict(points)
    for side in SIDES:  # the armpit lies three tenths of the way from the shoulder to the thorax
        x, y, z = (a + 0.3 * (b - a) for a, b in zip(points[f'{side}_shoulder'], points['thorax'], strict=True))
        points[f'{side}_armpit'] = (x, y, z)
    return [
        Capsule(points[start], points[end], (a * units[unit], b * units[unit]), PARTS[part], outfit.paints[part])
        for part, start, end, a, b, unit in _ROWS
        if end not in outfit.missing
    ]


def _cut(paint: Paint, covered: float, end: Colour) -> Paint:
    """A garment that covers the given share of a segment; beyond it, ``end`` shows."""
    if covered <= 0:
        return Paint(end)
    return paint._replace(cut=covered, end=end) if covered < 1 else paint
