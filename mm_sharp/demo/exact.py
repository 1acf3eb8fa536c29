"""Arithmetic and random draws that give the same bits on every machine.

IEEE 754 fixes the results of ``+ - * /`` and ``sqrt``, in Python and in numpy's elementwise loops. It does not fix
``sin``: angles are whole numbers of 1/4096 turn, looked up in a sine table that is rounded to 2^-24, with no entry
within 1e-12 of a rounding boundary. Nor the order in which ``@`` and sums add: sums are written out. Nor numpy's
distributions (NEP 19): only ``Generator.random()`` over PCG64 is used, and scaled in Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
Item = TypeVar('Item')

#: Angle units in a full turn, about 0.09 degrees each.
TURN = 4096
_SINE = tuple(round(math.sin(2 * math.pi * k / TURN) * 2**24) / 2**24 for k in range(TURN))


def angle_units(degrees: float) -> int:
    """The nearest angle in units of 1/4096 turn."""
    return round(degrees * TURN / 360)


def rotation(axis: str, units: int) -> Matrix:
    """Right-handed rotation about the axis ``'x'``, ``'y'`` or ``'z'`` by an angle in units of 1/4096 turn."""
    c, s = _SINE[(units + TURN // 4) % TURN], _SINE[units % TURN]
    return {
        'x': ((1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c)),
        'y': ((c, 0.0, s), (0.0, 1.0, 0.0), (-s, 0.0, c)),
        'z': ((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)),
    }[axis]


def rotate(matrix: Matrix, vector: Vector) -> Vector:
    """Matrix times column vector, the sums from left to right."""
    x, y, z = vector
    first, second, third = (row[0] * x + row[1] * y + row[2] * z for row in matrix)
    return (first, second, third)


def chain(*matrices: Matrix) -> Matrix:
    """Product of matrices: the last one is applied to a vector first."""
    product = matrices[0]
    for matrix in matrices[1:]:
        # Its columns, turned; zip transposes.
        first, second, third = zip(*(rotate(product, column) for column in zip(*matrix, strict=True)), strict=True)
        product = (first, second, third)
    return product


def add(a: Vector, b: Vector) -> Vector:
    """Sum of two vectors."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


class Draws:
    """The random numbers of one image, which depend on ``(seed, split, index)``, each in [0, 2^32), alone."""

    def __init__(self, seed: int, split: int, index: int) -> None:
        for name, value in (('seed', seed), ('split', split), ('index', index)):
            # Each has one 32-bit word of the seed sequence, else two images could share their words.
            if not 0 <= value < 2**32:
                raise ValueError(f'{name}={value} must be a whole number in [0, 4294967295]')
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, split, index))))

    def unit(self) -> float:
        """A number in [0, 1)."""
        return float(self._generator.random())

    def uniform(self, bounds: tuple[float, float]) -> float:
        """A number between the two bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * self.unit()

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.unit() * (high - low + 1))

    def angle(self, degrees: tuple[float, float]) -> int:
        """An angle between two bounds in degrees, as whole units of 1/4096 turn."""
        return self.integer(angle_units(degrees[0]), angle_units(degrees[1]))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.unit() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, all equally likely."""
        return items[self.integer(0, len(items) - 1)]

    def weighted(self, weights: Mapping[str, int]) -> str:
        """One of the keys, with probability proportional to its whole-number weight."""
        return self.choice([name for name, weight in weights.items() for _ in range(weight)])

    def array(self, *shape: int) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1), of the given shape."""
        return self._generator.random(shape)
