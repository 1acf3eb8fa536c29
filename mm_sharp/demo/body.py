"""A clothed body: which capsules a person is made of, and what they are painted with.

``PARTS`` numbers the parts, so that a rendered pixel tells which part it shows; ``OWN_PARTS`` says on which
parts a keypoint counts as seen, and how deep under the surface it may lie there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mm_sharp.demo.exact import Draws, Vector
from mm_sharp.demo.render import Capsule, Colour, Paint
from mm_sharp.demo.settings import SETTINGS, Settings
from mm_sharp.demo.skeleton import Points, Proportions

SKIN_TONES: tuple[Colour, ...] = (
    (243, 205, 178), (226, 178, 144), (198, 145, 108), (160, 108, 76), (115, 74, 52), (84, 56, 42),
)  # fmt: skip
HAIR_COLOURS: tuple[Colour, ...] = (
    (30, 24, 22), (70, 45, 30), (120, 76, 40), (186, 148, 88), (150, 66, 34), (150, 150, 150),
)  # fmt: skip

_SIDED = ('upper_arm', 'forearm', 'hand', 'thigh', 'shin', 'foot', 'eye', 'ear', 'flank')
_CENTRAL = ('chest', 'belly', 'pelvis', 'shoulders', 'neck', 'face', 'hair', 'nose', 'mouth', 'front')
_NAMES = (*(f'{side}_{part}' for side in ('left', 'right') for part in _SIDED), *_CENTRAL)
PARTS: dict[str, int] = {name: number for number, name in enumerate(_NAMES)}

#: For each keypoint, without its side: its own parts (a leading ``*`` stands for the side) and the largest
#: depth, metres at girth 1, of the keypoint under a surface on which it still counts as seen.
OWN_PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    'nose': (('nose', 'face'), 0.05),
    'eye': (('*_eye', 'face'), 0.035),
    'ear': (('*_ear', 'face'), 0.05),
    'shoulder': (('*_upper_arm', '*_flank', 'shoulders', 'chest'), 0.13),
    'elbow': (('*_upper_arm', '*_forearm'), 0.10),
    'wrist': (('*_forearm', '*_hand'), 0.09),
    'hip': (('*_thigh', '*_flank', 'pelvis', 'belly', 'front'), 0.17),
    'knee': (('*_thigh', '*_shin'), 0.13),
    'ankle': (('*_shin', '*_foot'), 0.10),
}


def own_parts(keypoint: str) -> tuple[frozenset[int], float]:
    """Numbers of the parts that show a COCO keypoint, and the allowed depth under them (metres)."""
    side, _, plain = keypoint.rpartition('_')
    names, depth = OWN_PARTS[plain]
    return frozenset(PARTS[name.replace('*', side)] for name in names), depth


@dataclass(frozen=True)
class Outfit:
    """Colours and cuts of one person.

    Attributes:
        skin, hair, shoes, shirt_front: plain colours; the last is a zip or a row of buttons.
        shirt, trousers: paint of the left and of the right side.
        sleeve, leg: share of the arm and of the leg that is covered, 0 to 2 (2 segments).
        long_hair, bald: style of the hair.
    """

    skin: Colour
    hair: Colour
    shoes: Colour
    shirt_front: Colour
    shirt: tuple[Paint, Paint]
    trousers: tuple[Paint, Paint]
    sleeve: float
    leg: float
    long_hair: bool
    bald: bool


def draw_colour(draws: Draws, low: int = 20, high: int = 235) -> Colour:
    """A random colour."""
    return (draws.integer(low, high), draws.integer(low, high), draws.integer(low, high))


def _garment(draws: Draws, settings: Settings) -> tuple[Paint, Paint]:
    """Paint for the left and the right half of a garment."""
    paint = Paint(draw_colour(draws), draw_colour(draws))
    if draws.chance(settings.pattern_chance):
        rings, strips = draws.choice(((5, 0), (0, 4), (6, 4), (3, 0)))
        paint = replace(paint, rings=rings, strips=strips)
    if not draws.chance(settings.two_tone_chance):
        return paint, paint
    return paint, replace(paint, base=_darker(paint.base, 5, 9), other=_darker(paint.other, 5, 9))


def _darker(colour: Colour, numerator: int, denominator: int) -> Colour:
    red, green, blue = (value * numerator // denominator for value in colour)
    return (red, green, blue)


def draw_outfit(draws: Draws, settings: Settings = SETTINGS) -> Outfit:
    """Random colours, patterns and lengths."""
    jitter = draws.integer(-12, 12)
    red, green, blue = (min(value + jitter, 255) for value in draws.choice(SKIN_TONES))
    return Outfit(
        skin=(red, green, blue),
        hair=draws.choice(HAIR_COLOURS),
        shoes=draw_colour(draws, 10, 200),
        shirt_front=draw_colour(draws),
        shirt=_garment(draws, settings),
        trousers=_garment(draws, settings),
        sleeve=draws.choice((0.1, 0.6, 1.3, 1.9)),
        leg=draws.choice((0.7, 1.1, 1.9, 1.9)),
        long_hair=draws.chance(0.35),
        bald=draws.chance(0.1),
    )


def body_capsules(points: Points, body: Proportions, outfit: Outfit) -> list[Capsule]:
    """The capsules of a person whose points are given in camera coordinates."""
    capsules = [*_trunk(points, body.girth, outfit), *_head(points, body, outfit)]
    for index, side in enumerate(('left', 'right')):
        capsules += _limbs(points, body.girth, outfit, side, index)
    return capsules


def _capsule(
    points: Points, ends: tuple[str, str], radii: tuple[float, float], part: str, paint: Paint, scale: float = 1.0
) -> Capsule:
    return Capsule(points[ends[0]], points[ends[1]], (radii[0] * scale, radii[1] * scale), PARTS[part], paint)


def _cut(paint: Paint, covered: float, end: Colour) -> Paint:
    """A garment that covers the given share of a segment; beyond it, ``end`` shows."""
    return replace(paint, cut=covered, end=end) if covered < 1 else paint


def _trunk(points: Points, girth: float, outfit: Outfit) -> Iterator[Capsule]:
    shirt, trousers, zip_ = outfit.shirt[0], outfit.trousers[0], Paint(outfit.shirt_front)
    yield _capsule(points, ('thorax', 'waist'), (0.07, 0.105), 'chest', shirt, girth)
    hem = _cut(shirt, 0.6, trousers.base)
    yield _capsule(points, ('waist', 'pelvis'), (0.105, 0.108), 'belly', hem, girth)
    yield _capsule(points, ('left_hip', 'right_hip'), (0.092, 0.092), 'pelvis', trousers, girth)
    yield _capsule(points, ('left_shoulder', 'right_shoulder'), (0.058, 0.058), 'shoulders', shirt, girth)
    for index, side in enumerate(('left', 'right')):
        paint = _cut(outfit.shirt[index], 0.88, outfit.trousers[index].base)
        top = _between(points[f'{side}_shoulder'], points['thorax'], 0.3)
        yield Capsule(top, points[f'{side}_hip'], (0.075 * girth, 0.085 * girth), PARTS[f'{side}_flank'], paint)
    yield _capsule(points, ('collar', 'belly'), (0.014, 0.014), 'front', zip_)
    yield _capsule(points, ('belly', 'buckle'), (0.014, 0.02), 'front', zip_)


def _between(a: Vector, b: Vector, share: float) -> Vector:
    """The point a given share of the way from a to b."""
    x, y, z = (start + share * (end - start) for start, end in zip(a, b, strict=True))
    return (x, y, z)


def _head(points: Points, body: Proportions, outfit: Outfit) -> Iterator[Capsule]:
    size = body.head
    skin, hair, shadow = Paint(outfit.skin), Paint(outfit.hair), Paint(_darker(outfit.skin, 3, 4))
    yield _capsule(points, ('thorax', 'skull_low'), (0.055, 0.055), 'neck', skin, body.girth)
    yield _capsule(points, ('skull_low', 'skull_high'), (0.29, 0.33), 'face', skin, size)
    yield _capsule(points, ('nose_bridge', 'nose'), (0.05, 0.07), 'nose', shadow, size)
    yield _capsule(points, ('left_mouth', 'right_mouth'), (0.04, 0.04), 'mouth', Paint((150, 50, 55)), size)
    for side in ('left', 'right'):
        eye, ear = f'{side}_eye', f'{side}_ear'
        yield _capsule(points, (eye, eye), (0.07, 0.07), eye, Paint((15, 15, 25)), size)
        yield _capsule(points, (ear, ear), (0.08, 0.08), ear, shadow, size)
    if not outfit.bald:
        yield _capsule(points, ('hair_low', 'hair_high'), (0.32, 0.34), 'hair', hair, size)
    if outfit.long_hair:
        yield _capsule(points, ('hair_low', 'hair_end'), (0.32, 0.2), 'hair', hair, size)


def _limbs(points: Points, girth: float, outfit: Outfit, side: str, index: int) -> Iterator[Capsule]:
    """Arm and leg: (ends, radii at girth 1, part, paint) of each segment."""
    shirt, trousers, skin = outfit.shirt[index], outfit.trousers[index], Paint(outfit.skin)
    sleeve, leg = outfit.sleeve, outfit.leg
    arm, thigh = _cut(shirt, sleeve, outfit.skin), _cut(trousers, leg, outfit.skin)
    forearm = skin if sleeve <= 1 else _cut(shirt, sleeve - 1, outfit.skin)
    shin = skin if leg <= 1 else _cut(trousers, leg - 1, outfit.skin)
    for start, end, radii, part, paint in (
        ('shoulder', 'elbow', (0.058, 0.045), 'upper_arm', arm),
        ('elbow', 'wrist', (0.045, 0.034), 'forearm', forearm),
        ('wrist', 'hand', (0.036, 0.043), 'hand', skin),
        ('hip', 'knee', (0.088, 0.062), 'thigh', thigh),
        ('knee', 'ankle', (0.062, 0.042), 'shin', shin),
        ('heel', 'toe', (0.05, 0.04), 'foot', Paint(outfit.shoes)),
    ):
        yield _capsule(points, (f'{side}_{start}', f'{side}_{end}'), radii, f'{side}_{part}', paint, girth)
