"""A clothed body: which capsules a person is made of, and what they are painted with."""

from __future__ import annotations

from typing import NamedTuple

from mm_sharp.demo.exact import Draws, Vector
from mm_sharp.demo.render import Capsule, Colour, Paint
from mm_sharp.demo.settings import SETTINGS, Settings
from mm_sharp.demo.skeleton import SIDES, TABLES, Points, Proportions

SKIN_TONES: tuple[Colour, ...] = (
    (243, 205, 178), (226, 178, 144), (198, 145, 108), (160, 108, 76), (115, 74, 52), (84, 56, 42),
)  # fmt: skip
HAIR_COLOURS: tuple[Colour, ...] = (
    (30, 24, 22), (70, 45, 30), (120, 76, 40), (186, 148, 88), (150, 66, 34), (150, 150, 150),
)  # fmt: skip

_ROWS: list[tuple[str, str, str, float, float, str]] = TABLES['capsules']
PARTS: dict[str, int] = {name: number for number, name in enumerate(dict.fromkeys(row[0] for row in _ROWS))}


def own_parts(keypoint: str) -> tuple[frozenset[int], float]:
    """Numbers of the parts that show a COCO keypoint, and the allowed depth under them (metres)."""
    side, _, plain = keypoint.rpartition('_')
    names, depth = TABLES['own_parts'][plain]
    return frozenset(PARTS[name.replace('*', side)] for name in names), depth


class Outfit(NamedTuple):
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
    units, paints = {'girth': body.girth, 'head': body.head, 'metres': 1.0}, _paints(outfit)
    armpits = {f'{side}_armpit': _between(points[f'{side}_shoulder'], points['thorax'], 0.3) for side in SIDES}
    points, missing = {**points, **armpits}, {'hair_high': outfit.bald, 'hair_end': not outfit.long_hair}
    return [
        Capsule(points[start], points[end], (first * units[unit], second * units[unit]), PARTS[part], paints[part])
        for part, start, end, first, second, unit in _ROWS
        if not missing.get(end)
    ]


def _between(a: Vector, b: Vector, share: float) -> Vector:
    x, y, z = (start + share * (end - start) for start, end in zip(a, b, strict=True))
    return (x, y, z)


def _paints(outfit: Outfit) -> dict[str, Paint]:
    (shirt, _), (trousers, _), skin = outfit.shirt, outfit.trousers, Paint(outfit.skin)
    shadow, hair = Paint(_darker(outfit.skin, 3, 4)), Paint(outfit.hair)
    paints = {'chest': shirt, 'belly': _cut(shirt, 0.6, trousers.base), 'pelvis': trousers, 'shoulders': shirt}
    paints |= {'front': Paint(outfit.shirt_front), 'neck': skin, 'face': skin, 'nose': shadow, 'hair': hair}
    paints['mouth'] = Paint((150, 50, 55))
    for side, shirt, trousers in zip(SIDES, outfit.shirt, outfit.trousers, strict=True):
        sided = {
            'flank': _cut(shirt, 0.88, trousers.base),
            'eye': Paint((15, 15, 25)),
            'ear': shadow,
            'upper_arm': _cut(shirt, outfit.sleeve, outfit.skin),
            'forearm': _cut(shirt, outfit.sleeve - 1, outfit.skin),
            'hand': skin,
            'thigh': _cut(trousers, outfit.leg, outfit.skin),
            'shin': _cut(trousers, outfit.leg - 1, outfit.skin),
            'foot': Paint(outfit.shoes),
        }
        paints |= {f'{side}_{part}': paint for part, paint in sided.items()}
    return paints


def _cut(paint: Paint, covered: float, end: Colour) -> Paint:
    """A garment that covers the given share of a segment; beyond it, ``end`` shows."""
    if covered <= 0:
        return Paint(end)
    return paint._replace(cut=covered, end=end) if covered < 1 else paint
