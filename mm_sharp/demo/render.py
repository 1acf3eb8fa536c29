"""Rounded limbs before a pinhole camera, drawn into a layer with colour, depth and part number.

The world has y up and z toward a viewer at azimuth 0; a picture has u to the right and v down, whole numbers at pixel
centres. The only solid is the capsule, the hull of two balls in camera space. Its outline is exact for the two
projected discs; depth and normal inside are those of the ball that touches the pixel's ray in the picture plane.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mm_sharp.demo.exact import Vector, chain, rotate, rotation

Colour = tuple[int, int, int]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

EMPTY = -1  # part number of pixels where nothing was drawn


class Camera(NamedTuple):
    """A view of the origin: a point p is turned, ``R_z(roll) R_x(elevation) R_y(-azimuth) p``, and moved away.

    Angles are in units of 1/4096 turn, ``distance`` in metres, the rest in pixels.
    """

    azimuth: int
    elevation: int
    roll: int
    distance: float
    focal: float = 1.0
    centre: tuple[float, float] = (0.0, 0.0)

    def view(self, points: dict[str, Vector]) -> dict[str, Vector]:
        """Camera coordinates (X right, Y down, Z away; metres) of points in the world."""
        matrix = chain(rotation('z', self.roll), rotation('x', self.elevation), rotation('y', -self.azimuth))
        turned = {name: rotate(matrix, point) for name, point in points.items()}
        return {name: (right, -up, self.distance - near) for name, (right, up, near) in turned.items()}

    def project(self, seen: Vector) -> tuple[float, float]:
        """Pixel coordinates (u, v) of a point in camera coordinates."""
        scale = self.focal / seen[2]
        return (self.centre[0] + scale * seen[0], self.centre[1] + scale * seen[1])

    def framing(self, seen: dict[str, Vector], size: tuple[float, float], middle: tuple[float, float]) -> Camera:
        """The same view, zoomed so that points in camera coordinates fill ``size`` pixels round ``middle``."""
        across, down = zip(*((x / z, y / z) for x, y, z in seen.values()), strict=True)
        left, right, top, bottom = min(across), max(across), min(down), max(down)
        focal = min(size[0] / (right - left), size[1] / (bottom - top))
        centre = (middle[0] - focal * (left + right) / 2, middle[1] - focal * (top + bottom) / 2)
        return self._replace(focal=focal, centre=centre)


class Paint(NamedTuple):
    """Colours of a capsule (RGB, 0 to 255)."""

    base: Colour
    other: Colour = (0, 0, 0)  # of the pattern
    rings: int = 0  # bands along the capsule
    strips: int = 0  # bands across it; with rings: checks
    cut: float = 2.0  # the fraction of the length from which on ``end`` is used, as where a sleeve ends
    end: Colour = (0, 0, 0)


class Capsule(NamedTuple):
    """The hull of two balls: centres in camera coordinates and radii, metres; its part and paint."""

    first: Vector
    second: Vector
    radii: tuple[float, float]
    part: int
    paint: Paint


class Light(NamedTuple):
    """Light from everywhere (``ambient``) and from a unit direction in camera coordinates."""

    direction: Vector
    ambient: float
    diffuse: float


class Layer(NamedTuple):
    """What was drawn: colour (H, W, 3) uint8, depth (H, W) metres, part (H, W) int16."""

    colour: npt.NDArray[np.uint8]
    depth: Floats
    part: npt.NDArray[np.int16]

    @classmethod
    def empty(cls, width: int, height: int) -> Layer:
        """A layer with nothing on it, infinitely far away."""
        colour, depth = np.zeros((height, width, 3), np.uint8), np.full((height, width), np.inf)
        return cls(colour, depth, np.full((height, width), EMPTY, np.int16))

    @property
    def mask(self) -> Mask:
        """(H, W): where something was drawn."""
        drawn: Mask = self.part != EMPTY
        return drawn


def draw_capsule(layer: Layer, capsule: Capsule, camera: Camera, light: Light) -> None:
    """Draw a capsule into a layer, where it is nearer than what is there."""
    centres = (capsule.first, capsule.second)
    ends = [camera.project(centre) for centre in centres]
    radii = [camera.focal * radius / centre[2] for centre, radius in zip(centres, capsule.radii, strict=True)]
    spans = []  # of the columns and of the rows that the two discs cover
    for axis, size in ((0, layer.depth.shape[1]), (1, layer.depth.shape[0])):
        low = max(math.floor(min(end[axis] - radius for end, radius in zip(ends, radii, strict=True))), 0)
        high = min(math.ceil(max(end[axis] + radius for end, radius in zip(ends, radii, strict=True))) + 1, size)
        spans.append(slice(low, max(low, high)))
    u, v = (np.arange(span.start, span.stop, dtype=np.float64) for span in spans)
    depths = (capsule.first[2], capsule.second[2])
    inside, depth, *surface = _cast(u[None, :], v[:, None], ends, radii, depths, camera.focal)
    window = (spans[1], spans[0])
    seen = inside & (depth < layer.depth[window])
    layer.depth[window][seen] = depth[seen]
    layer.part[window][seen] = capsule.part
    layer.colour[window][seen] = _shade([part[seen] for part in surface], capsule.paint, light)


def draw_card(layer: Layer, box: tuple[int, int, int, int], depth: float, part: int, colour: Colour) -> None:
    """Fill a rectangle ``(left, top, right, bottom)``, ends excluded, at a constant depth (metres)."""
    left, top, right, bottom = box
    window = (slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0)))
    seen = depth < layer.depth[window]
    layer.depth[window][seen] = depth
    layer.part[window][seen] = part
    layer.colour[window][seen] = colour


def _cast(
    u: Floats, v: Floats, ends: list[tuple[float, float]], radii: list[float], depths: tuple[float, float], focal: float
) -> tuple[Mask, Floats, Floats, Floats, Floats, Floats, Floats]:
    """Over a window of pixels: inside, depth, t, side, and the normal.

    With L the distance of the discs in pixels, r0 and r1 their radii, along and across a pixel's coordinates in the
    capsule's frame: ``sin(alpha) = (r0 - r1) / L``, ``t = clamp((along - |across| tan(alpha)) / L, 0, 1)``,
    ``r = r0 + t (r1 - r0)``, ``d^2 = (along - t L)^2 + across^2``; inside where ``d^2 <= r^2``; the depth is
    ``z0 + t (z1 - z0) - sqrt(r^2 - d^2) Z / focal``.
    """
    (u0, v0), (u1, v1) = ends
    length = math.sqrt((u1 - u0) * (u1 - u0) + (v1 - v0) * (v1 - v0))
    taper = radii[0] - radii[1]
    du, dv = u - u0, v - v0
    if length <= abs(taper) + 1e-6:  # one disc hides the other: a ball
        t = np.full(np.broadcast_shapes(u.shape, v.shape), 0.0 if taper >= 0 else 1.0)
        axis = (1.0, 0.0)
    else:
        axis = ((u1 - u0) / length, (v1 - v0) / length)
        slope = taper / math.sqrt(length * length - taper * taper)  # tan(alpha)
        along = du * axis[0] + dv * axis[1]
        across = dv * axis[0] - du * axis[1]
        t = np.minimum(np.maximum((along - np.abs(across) * slope) / length, 0.0), 1.0)
    x, y = du - t * (u1 - u0), dv - t * (v1 - v0)
    radius = radii[0] - t * taper
    bulge: Floats = radius * radius - (x * x + y * y)
    inside: Mask = bulge >= 0.0
    lift = np.sqrt(np.maximum(bulge, 0.0))
    middle = depths[0] + t * (depths[1] - depths[0])
    side, depth = (y * axis[0] - x * axis[1]) / radius, middle - lift * middle / focal
    return inside, depth, t, side, x / radius, y / radius, -lift / radius


def _shade(surface: list[Floats], paint: Paint, light: Light) -> npt.NDArray[np.uint8]:
    """Colours (n, 3) of n pixels from their t, side and normal: pattern, then ambient and directed light."""
    t, side, x, y, z = surface
    lit = x * light.direction[0] + y * light.direction[1] + z * light.direction[2]
    strength = light.ambient + light.diffuse * np.maximum(lit, 0.0)
    odd = np.zeros(t.shape, np.int64)
    if paint.rings:
        odd += np.floor(t * paint.rings).astype(np.int64)
    if paint.strips:
        odd += np.floor((side + 1.0) * (paint.strips / 2)).astype(np.int64)
    choice = np.where(t >= paint.cut, 2, odd % 2)
    table = np.array((paint.base, paint.other, paint.end), np.float64)
    bright: Floats = np.minimum(table[choice] * strength[:, None], 255.0)
    return bright.astype(np.uint8)
