"""A clothed body: which capsules a person is made of, and what they are painted with."""

from __future__ import annotations

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

_SIDES = ('left', 'right')
_SIDED = ('upper_arm', 'forearm', 'hand', 'thigh', 'shin', 'foot', 'eye', 'ear', 'flank')
_CENTRAL = ('chest', 'belly', 'pelvis', 'shoulders', 'neck', 'face', 'hair', 'nose', 'mouth', 'front')
_NAMES = (*(f'{side}_{part}' for side in _SIDES for part in _SIDED), *_CENTRAL)
PARTS: dict[str, int] = {name: number for number, name in enumerate(_NAMES)}

#: For each keypoint, without its side: the parts on which it counts as seen (``*`` stands for the side), and how deep,
#: in metres at girth 1, it may lie under their surface.
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
    """Colours and cuts of one person."""

    skin: Colour
    hair: Colour
    shoes: Colour
    shirt_front: Colour  # a zip or a row of buttons
    shirt: tuple[Paint, Paint]  # of the left and of the right side
    trousers: tuple[Paint, Paint]
    sleeve: float  # the share of the arm that is covered, 0 to 2 segments
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


#: A capsule: its part, the points at its ends, the radii there in a unit ('girth', 'head' or 'metres'), and its paint.
Row = tuple[str, str, str, float, float, str, Paint]


def body_capsules(points: Points, body: Proportions, outfit: Outfit) -> list[Capsule]:
    """The capsules of a person whose points are given in camera coordinates."""
    units = {'girth': body.girth, 'head': body.head, 'metres': 1.0}
    armpits = {f'{side}_armpit': _between(points[f'{side}_shoulder'], points['thorax'], 0.3) for side in _SIDES}
    points = {**points, **armpits}
    rows = [*_trunk(outfit), *_head(outfit), *_limbs(outfit, 0), *_limbs(outfit, 1)]
    return [
        Capsule(points[start], points[end], (first * units[unit], second * units[unit]), PARTS[part], paint)
        for part, start, end, first, second, unit, paint in rows
    ]


def _between(a: Vector, b: Vector, share: float) -> Vector:
    """The point a given share of the way from a to b."""
    x, y, z = (start + share * (end - start) for start, end in zip(a, b, strict=True))
    return (x, y, z)


def _cut(paint: Paint, covered: float, end: Colour) -> Paint:
    """A garment that covers the given share of a segment; beyond it, ``end`` shows."""
    return replace(paint, cut=covered, end=end) if covered < 1 else paint


def _trunk(outfit: Outfit) -> list[Row]:
    shirt, trousers, front = outfit.shirt[0], outfit.trousers[0], Paint(outfit.shirt_front)
    left, right = (_cut(outfit.shirt[index], 0.88, outfit.trousers[index].base) for index in (0, 1))
    return [
        ('chest', 'thorax', 'waist', 0.07, 0.105, 'girth', shirt),
        ('belly', 'waist', 'pelvis', 0.105, 0.108, 'girth', _cut(shirt, 0.6, trousers.base)),
        ('pelvis', 'left_hip', 'right_hip', 0.092, 0.092, 'girth', trousers),
        ('shoulders', 'left_shoulder', 'right_shoulder', 0.058, 0.058, 'girth', shirt),
        ('left_flank', 'left_armpit', 'left_hip', 0.075, 0.085, 'girth', left),
        ('right_flank', 'right_armpit', 'right_hip', 0.075, 0.085, 'girth', right),
        ('front', 'collar', 'belly', 0.014, 0.014, 'metres', front),
        ('front', 'belly', 'buckle', 0.014, 0.02, 'metres', front),
    ]


def _head(outfit: Outfit) -> list[Row]:
    skin, hair, shadow = Paint(outfit.skin), Paint(outfit.hair), Paint(_darker(outfit.skin, 3, 4))
    rows = [
        ('neck', 'thorax', 'skull_low', 0.055, 0.055, 'girth', skin),
        ('face', 'skull_low', 'skull_high', 0.29, 0.33, 'head', skin),
        ('nose', 'nose_bridge', 'nose', 0.05, 0.07, 'head', shadow),
        ('mouth', 'left_mouth', 'right_mouth', 0.04, 0.04, 'head', Paint((150, 50, 55))),
    ]
    for eye, ear in (('left_eye', 'left_ear'), ('right_eye', 'right_ear')):
        rows.append((eye, eye, eye, 0.07, 0.07, 'head', Paint((15, 15, 25))))
        rows.append((ear, ear, ear, 0.08, 0.08, 'head', shadow))
    if not outfit.bald:
        rows.append(('hair', 'hair_low', 'hair_high', 0.32, 0.34, 'head', hair))
    if outfit.long_hair:
        rows.append(('hair', 'hair_low', 'hair_end', 0.32, 0.2, 'head', hair))
    return rows


def _limbs(outfit: Outfit, index: int) -> list[Row]:
    """Arm and leg of one side."""
    shirt, trousers, skin = outfit.shirt[index], outfit.trousers[index], Paint(outfit.skin)
    sleeve, leg, side = outfit.sleeve, outfit.leg, _SIDES[index]
    forearm = skin if sleeve <= 1 else _cut(shirt, sleeve - 1, outfit.skin)
    shin = skin if leg <= 1 else _cut(trousers, leg - 1, outfit.skin)
    rows = (
        ('upper_arm', 'shoulder', 'elbow', 0.058, 0.045, _cut(shirt, sleeve, outfit.skin)),
        ('forearm', 'elbow', 'wrist', 0.045, 0.034, forearm),
        ('hand', 'wrist', 'hand', 0.036, 0.043, skin),
        ('thigh', 'hip', 'knee', 0.088, 0.062, _cut(trousers, leg, outfit.skin)),
        ('shin', 'knee', 'ankle', 0.062, 0.042, shin),
        ('foot', 'heel', 'toe', 0.05, 0.04, Paint(outfit.shoes)),
    )
    return [(f'{side}_{a}', f'{side}_{b}', f'{side}_{c}', r0, r1, 'girth', paint) for a, b, c, r0, r1, paint in rows]
