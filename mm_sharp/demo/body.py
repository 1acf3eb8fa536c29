"""A clothed body: which capsules a person is made of, and what they are painted with."""

from __future__ import annotations

from typing import NamedTuple

from mm_sharp.demo.exact import Draws
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
