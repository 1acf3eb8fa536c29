"""One picture: people before a camera, what hides them, light; and what can be said about each person."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mm_sharp.demo.body import (
    COCO_KEYPOINTS,
    HAIR_COLOURS,
    SKIN_TONES,
    Points,
    Proportions,
    body_capsules,
    body_points,
    draw_colour,
    draw_outfit,
    draw_pose,
    draw_proportions,
    own_parts,
)
from mm_sharp.demo.exact import Draws, add, rotate, rotation
from mm_sharp.demo.render import Camera, Capsule, Floats, Layer, Light, Mask, Paint, draw_capsule, draw_card
from mm_sharp.demo.settings import HEIGHT, SETTINGS, SPLITS, WIDTH, Settings

Pixel = tuple[int, int]

#: Depths in metres; people stand between 1 and 10.
_FAR, _WALL, _NEAR = 50.0, 60.0, 0.5
#: Backdrop and occluders are placed in pixels: X = u Z / focal.
_FLAT = Camera(azimuth=0, elevation=0, roll=0, distance=_FAR, focal=300.0)
#: A person counts if at least this many keypoints are seen and pixels are left; else the scene is redrawn.
MIN_SEEN_KEYPOINTS, MIN_AREA = 5, 400
_ATTEMPTS = 200


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


class Person(NamedTuple):
    """What a picture shows of one person, in pixels."""

    #: (u, v) of each COCO keypoint, and 2 where it is seen, 1 where something hides it; all 0 outside of the image.
    keypoints: tuple[tuple[float, float, int], ...]
    points: dict[str, tuple[float, float]]  # every point of the skeleton, also outside, rounded to 1/100
    box: tuple[int, int, int, int]  # left, top, width, height of the outline inside, with what others cover
    area: int  # number of pixels that show this person


class Figure(NamedTuple):
    """A person as drawn."""

    seen: Points  # in camera coordinates
    layer: Layer  # its own
    girth: float


class Scene(NamedTuple):
    """What :func:`draw_scene` draws."""

    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    people: tuple[Person, ...]
    owner: npt.NDArray[np.int16]  # (H, W): the number of the person seen, else -1


def draw_scene(seed: int, split: str, index: int, settings: Settings = SETTINGS) -> Scene:
    """Draw picture number ``index`` (from 0) of a split, with every person at least partly in view."""
    if split not in SPLITS:
        raise ValueError(f'split={split!r} must be one of {SPLITS}')
    draws = Draws(seed, SPLITS.index(split), index)
    for _ in range(_ATTEMPTS):
        scene = _attempt(draws, settings)
        seen = [sum(flag == 2 for _, _, flag in person.keypoints) for person in scene.people]
        if min(seen) >= MIN_SEEN_KEYPOINTS and min(person.area for person in scene.people) >= MIN_AREA:
            return scene
    raise RuntimeError(
        f'settings leave nobody in view in {_ATTEMPTS} attempts (image {index} of {split}): lower '
        'truncation, second_person_chance or occluder_chance'
    )


def judge(figure: Figure, shown: Mask, camera: Camera) -> Person:
    """What the picture shows of a figure drawn with ``camera``: ``shown`` (H, W) are the pixels that show it."""
    projected = {name: camera.project(point) for name, point in figure.seen.items()}
    points = {name: (round(u, 2), round(v, 2)) for name, (u, v) in projected.items()}
    keypoints = [_keypoint(name, figure, shown, points[name]) for name in COCO_KEYPOINTS]
    left, top, width, height = cv2.boundingRect(figure.layer.mask.astype(np.uint8))  # all 0 for an empty one
    return Person(tuple(keypoints), points, (left, top, width, height), int(shown.sum()))


def _keypoint(name: str, figure: Figure, shown: Mask, point: tuple[float, float]) -> tuple[float, float, int]:
    if not (0 <= point[0] <= WIDTH - 1 and 0 <= point[1] <= HEIGHT - 1):
        return 0.0, 0.0, 0
    parts, depth = own_parts(name)
    u, v = (math.floor(value + 0.5) for value in point)
    near = figure.seen[name][2] - figure.layer.depth[v, u] <= depth * figure.girth
    return *point, 1 + bool(shown[v, u] and int(figure.layer.part[v, u]) in parts and near)


def _attempt(draws: Draws, settings: Settings) -> Scene:
    light = _draw_light(draws, settings)
    colour = draw_backdrop(draws, light, settings).colour
    camera, figures = _draw_figures(draws, light, settings)
    occluders = draw_occluders(draws, light, settings)
    owner, nearest = np.full((HEIGHT, WIDTH), -1, np.int16), np.full((HEIGHT, WIDTH), np.inf)
    for number, figure in enumerate(figures):
        shown = figure.layer.depth < nearest
        nearest[shown] = figure.layer.depth[shown]
        colour[shown] = figure.layer.colour[shown]
        owner[shown] = number
    colour[occluders.mask] = occluders.colour[occluders.mask]
    owner[occluders.mask] = -1
    people = tuple(judge(figure, owner == i, camera) for i, figure in enumerate(figures))
    return Scene(_develop(colour, draws, settings), people, owner)


def _draw_light(draws: Draws, settings: Settings) -> Light:
    across, up = draws.uniform((-1.0, 1.0)), draws.uniform((0.2, 1.0))
    length = math.sqrt(across * across + up * up + 0.5 * 0.5)
    direction = (across / length, -up / length, -0.5 / length)
    return Light(direction, ambient=draws.uniform(settings.ambient), diffuse=draws.uniform(settings.diffuse))


def _draw_figures(draws: Draws, light: Light, settings: Settings) -> tuple[Camera, list[Figure]]:
    front = settings.frontal_degrees if draws.chance(settings.frontal_share) else 180
    body = draw_proportions(draws)
    points = body_points(body, draw_pose(draws, settings))
    azimuth, elevation, roll = (draws.angle(d) for d in ((-front, front), settings.elevation, settings.roll))
    camera = Camera(azimuth, elevation, roll, draws.uniform(settings.distance))
    seen = camera.view(points)
    camera = _frame(draws, camera, seen, settings)
    figures = [draw_figure(draws, light, settings, camera, seen, body)]
    if draws.chance(settings.second_person_chance):
        body = draw_proportions(draws)
        points = body_points(body, draw_pose(draws, settings))
        # Beside and behind the first person as the camera sees it: nobody stands inside another.
        side = draws.choice((-1, 1)) * draws.uniform((0.35, 0.8))
        offset = rotate(rotation('y', camera.azimuth), (side, 0.0, -draws.uniform((0.5, 1.5))))
        heading = rotation('y', draws.angle((-180, 180)))
        seen = camera.view({name: add(rotate(heading, point), offset) for name, point in points.items()})
        figures.append(draw_figure(draws, light, settings, camera, seen, body))
    return camera, figures


def _frame(draws: Draws, camera: Camera, seen: Points, settings: Settings) -> Camera:
    """Zoom and shift, so that the person fills a random part of the image, or leaves it partly."""
    fill = draws.uniform(settings.fill)
    slack = (WIDTH * (1 - fill) / 2, HEIGHT * (1 - fill) / 2)
    shift = [slack[i] * draws.uniform((-1.0, 1.0)) for i in (0, 1)]
    if draws.chance(settings.truncation_chance):
        axis, sign = draws.choice((0, 1, 1)), draws.choice((-1, 1))
        shift[axis] = sign * (slack[axis] + (WIDTH, HEIGHT)[axis] * draws.uniform(settings.truncation))
    middle = ((WIDTH - 1) / 2 + shift[0], (HEIGHT - 1) / 2 + shift[1])
    return camera.framing(seen, (WIDTH * fill, HEIGHT * fill), middle)


def draw_figure(
    draws: Draws, light: Light, settings: Settings, camera: Camera, seen: Points, body: Proportions
) -> Figure:
    """Dress a person and draw it into a layer of its own."""
    layer = Layer.empty(WIDTH, HEIGHT)
    for capsule in body_capsules(seen, body, draw_outfit(draws, settings)):
        draw_capsule(layer, capsule, camera, light)
    return Figure(seen, layer, body.girth)


def _develop(colour: npt.NDArray[np.uint8], draws: Draws, settings: Settings) -> npt.NDArray[np.uint8]:
    image = _blur(_blur(colour)) if draws.chance(settings.blur_chance) else _blur(colour)
    contrast, brightness = draws.uniform(settings.contrast), draws.integer(*settings.brightness)
    noise = draws.integer(*settings.noise)
    grain = draws.array(HEIGHT, WIDTH, 3) * (2.0 * noise) - noise
    exposed = (image - 128.0) * contrast + (128.0 + brightness) + grain
    return np.clip(exposed, 0.0, 255.0).astype(np.uint8)


def _blur(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The kernel (1 2 1)/4 along rows and columns, in whole numbers."""
    wide = np.pad(image.astype(np.uint16), ((1, 1), (1, 1), (0, 0)), mode='edge')
    rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    both: npt.NDArray[np.uint16] = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    return ((both + 8) // 16).astype(np.uint8)
