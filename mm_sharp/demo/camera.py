"""A pinhole camera that looks at a body from any direction.

A point of the world (x to the right of a viewer who faces it from +z, y up, z toward that viewer) is turned
by the azimuth about y, by the elevation about x and by the roll about z, and moved ``distance`` away:

    (x', y', z') = R_z(roll) R_x(elevation) R_y(-azimuth) (p - target)
    X = x',  Y = -y',  Z = distance - z'
    u = centre_x + focal * X / Z,   v = centre_y + focal * Y / Z

with u to the right and v down, whole numbers at pixel centres. At azimuth 0 the camera faces the front of a
person who looks along +z, and the person's left is on the right of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mm_sharp.demo.exact import Matrix, Vector, chain, rotate, rotation

#: Nothing is drawn nearer to the camera than this, metres.
NEAREST = 0.3


@dataclass(frozen=True)
class Camera:
    """A view of ``target``; angles in units of 1/4096 turn, lengths in metres, focal in pixels."""

    azimuth: int
    elevation: int
    roll: int
    distance: float
    target: Vector = (0.0, 0.0, 0.0)
    focal: float = 1.0
    centre: tuple[float, float] = (0.0, 0.0)

    def rotation(self) -> Matrix:
        """World axes to the camera's, before the axes are renamed."""
        return chain(rotation('z', self.roll), rotation('x', self.elevation), rotation('y', -self.azimuth))

    def view(self, points: dict[str, Vector]) -> dict[str, Vector]:
        """Camera coordinates (X right, Y down, Z away; metres) of points in the world.

        Raises:
            ValueError: if a point is nearer than 0.3 m or behind the camera.
        """
        matrix, target = self.rotation(), self.target
        seen = {}
        for name, (x, y, z) in points.items():
            right, up, near = rotate(matrix, (x - target[0], y - target[1], z - target[2]))
            if self.distance - near < NEAREST:
                raise ValueError(
                    f'point {name} is {self.distance - near:.2f} m in front of the camera, nearer than '
                    f'{NEAREST} m: distance={self.distance} is too small'
                )
            seen[name] = (right, -up, self.distance - near)
        return seen

    def project(self, seen: Vector) -> tuple[float, float]:
        """Pixel coordinates (u, v) of a point in camera coordinates."""
        scale = self.focal / seen[2]
        return (self.centre[0] + scale * seen[0], self.centre[1] + scale * seen[1])

    def framing(self, seen: dict[str, Vector], size: tuple[float, float], middle: tuple[float, float]) -> Camera:
        """The same view with focal length and centre such that the points fit into a frame.

        Args:
            seen: points in camera coordinates.
            size: width and height of the frame in pixels; the tighter of the two is filled.
            middle: pixel on which the middle of the points' extent falls.
        """
        flat = [(x / z, y / z) for x, y, z in seen.values()]
        left, right = min(u for u, _ in flat), max(u for u, _ in flat)
        top, bottom = min(v for _, v in flat), max(v for _, v in flat)
        focal = min(size[0] / (right - left), size[1] / (bottom - top))
        return replace(
            self,
            focal=focal,
            centre=(
                middle[0] - focal * (left + right) / 2,
                middle[1] - focal * (top + bottom) / 2,
            ),
        )
