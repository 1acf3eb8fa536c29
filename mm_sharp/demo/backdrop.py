"""What stands behind and before the people: gradients, mottle, clutter, limb-like decoys, occluders."""

from __future__ import annotations

import numpy as np

from mm_sharp.demo.body import HAIR_COLOURS, SKIN_TONES, draw_colour
from mm_sharp.demo.exact import Draws
from mm_sharp.demo.render import Camera, Capsule, Floats, Layer, Light, Paint, draw_capsule, draw_card
from mm_sharp.demo.settings import HEIGHT, SETTINGS, WIDTH, Settings

Pixel = tuple[int, int]

#: Depths in metres; people stand between 1 and 10.
_FAR, _WALL, _NEAR = 50.0, 60.0, 0.5
#: Backdrop and occluders are placed in pixels: X = u Z / focal.
_FLAT = Camera(azimuth=0, elevation=0, roll=0, distance=_FAR, focal=300.0)


def upsample(grid: Floats, height: int, width: int) -> Floats:
    """Bilinear interpolation of a coarse grid (h, w, c) to the given size."""
    rows = np.arange(height, dtype=np.float64) * ((grid.shape[0] - 1) / (height - 1))
    columns = np.arange(width, dtype=np.float64) * ((grid.shape[1] - 1) / (width - 1))
    top = np.minimum(rows.astype(np.int64), grid.shape[0] - 2)
    left = np.minimum(columns.astype(np.int64), grid.shape[1] - 2)
    down, along = (rows - top)[:, None, None], (columns - left)[None, :, None]
    bands = grid[top] * (1.0 - down) + grid[top + 1] * down
    mixed: Floats = bands[:, left] * (1.0 - along) + bands[:, left + 1] * along
    return mixed


def draw_backdrop(draws: Draws, light: Light, settings: Settings = SETTINGS) -> Layer:
    """A wall with a gradient and mottle, in front of it random shapes and limb-like decoys."""
    layer = Layer.empty(WIDTH, HEIGHT)
    corners = np.array([[draw_colour(draws) for _ in range(2)] for _ in range(2)], np.float64)
    wall = upsample(corners, HEIGHT, WIDTH)
    for cells, strength in ((6, 40.0), (24, 26.0)):
        grain = draws.uniform((0.0, strength))
        wall += (upsample(draws.array(cells, cells, 1), HEIGHT, WIDTH) - 0.5) * grain
    layer.colour[:], layer.depth[:] = np.clip(wall, 0.0, 255.0).astype(np.uint8), _WALL
    for number in range(draws.integer(*settings.clutter)):
        _draw_shape(layer, draws, light, _FAR - 0.1 * number)
    for number in range(draws.integer(*settings.limb_clutter)):
        _draw_decoy(layer, draws, light, _FAR / 2 - 0.1 * number)
    return layer


def draw_occluders(draws: Draws, light: Light, settings: Settings = SETTINGS) -> Layer:
    """A layer with nothing, or with one object that stands before everybody."""
    layer = Layer.empty(WIDTH, HEIGHT)
    if not draws.chance(settings.occluder_chance):
        return layer
    width, height = draws.integer(WIDTH // 6, WIDTH // 2), draws.integer(HEIGHT // 8, HEIGHT // 3)
    left = draws.integer(-width // 2, WIDTH - width // 2)
    top = draws.integer(HEIGHT // 4, HEIGHT - height // 2)
    kind, colour = draws.choice(('box', 'post', 'ball')), draw_colour(draws)
    if kind == 'box':
        draw_card(layer, (left, top, left + width, top + height), _NEAR, 0, colour)
        return layer
    ends, radius = ((left, top), (left, top)), width / 3
    if kind == 'post':
        ends, radius = ((left, -10), (left + draws.integer(-WIDTH // 4, WIDTH // 4), HEIGHT + 10)), width / 6
    _draw_rod(layer, light, ends, (radius, radius), _NEAR, Paint(colour))
    return layer


def _draw_shape(layer: Layer, draws: Draws, light: Light, depth: float) -> None:
    kind = draws.choice(('box', 'box', 'ball', 'rod'))
    u, v = draws.integer(-20, WIDTH), draws.integer(-20, HEIGHT)
    colour = draw_colour(draws)
    if kind == 'box':
        draw_card(layer, (u, v, u + draws.integer(10, 80), v + draws.integer(10, 100)), depth, 0, colour)
        return
    radius = draws.uniform((6.0, 26.0) if kind == 'ball' else (2.0, 9.0))
    end = (draws.integer(0, WIDTH), draws.integer(0, HEIGHT)) if kind == 'rod' else (u, v)
    paint = Paint(colour, draw_colour(draws), rings=draws.choice((0, 0, 5)))
    _draw_rod(layer, light, ((u, v), end), (radius, radius), depth, paint)


def _draw_decoy(layer: Layer, draws: Draws, light: Light, depth: float) -> None:
    u, v = draws.integer(0, WIDTH), draws.integer(0, HEIGHT)
    end = (u + draws.integer(-45, 45), v + draws.integer(-45, 45))
    thick = draws.uniform((3.0, 8.0))
    bare = draws.choice(SKIN_TONES + HAIR_COLOURS)
    paint = Paint(draw_colour(draws), cut=draws.choice((0.0, 0.4, 0.7, 2.0)), end=bare)
    _draw_rod(layer, light, ((u, v), end), (thick, thick * 0.7), depth, paint)


def _draw_rod(
    layer: Layer, light: Light, ends: tuple[Pixel, Pixel], radii: tuple[float, float], depth: float, paint: Paint
) -> None:
    """A capsule given in pixels, at a constant depth (metres)."""
    scale = depth / _FLAT.focal
    first, second = ((u * scale, v * scale, depth) for u, v in ends)
    draw_capsule(layer, Capsule(first, second, (radii[0] * scale, radii[1] * scale), 0, paint), _FLAT, light)
