"""The forms of `shapes`: outlines, corners, and what of an object a scene shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

BACKGROUND = 4.0  # its depth: one behind the last of three objects
CLEAR = 0.02  # a corner is seen as far as this from what lies over its object
_FINE = (np.arange(64) + 0.5) / 64  # where two objects are looked for one over the other


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.9


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.72) - 0.28


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: Array, y: Array) -> Array:
    distance: Array = np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.55
    return distance


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    distance: Array = np.minimum(np.maximum(x - 1.0, y - 0.32), np.maximum(x - 0.32, y - 1.0))
    return distance


def _star(x: Array, y: Array) -> Array:
    """Five points of radius 1.1, inner vertices at 0.45: one edge between two of them, folded."""
    angle = np.abs((np.arctan2(x, y) % (0.4 * np.pi)) - 0.2 * np.pi)  # 0 at an inner vertex
    radius = np.hypot(x, y)
    inner, tip = 0.45, np.array([1.1 * np.cos(0.2 * np.pi), 1.1 * np.sin(0.2 * np.pi)])
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge = tip - np.array([inner, 0.0])
    distance: Array = ((along - inner) * edge[1] - across * edge[0]) / np.hypot(*edge)
    return distance


# Signed distance to each form's outline, in units of the object's radius; negative inside.
FORMS: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


def _star_corners() -> Array:
    angles = np.pi * np.arange(10) / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.1)
    return np.stack([radii * np.sin(angles), radii * np.cos(angles)], axis=1)


# (N, 2): x and y of all corners in the same units. A disc and a ring have none.
CORNERS: dict[str, Array] = {
    "square": 0.8 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": np.array([[0, 1.1], [0.825 / 0.866, -0.55], [-0.825 / 0.866, -0.55]]),
    "cross": np.array(
        [
            (sign_x * x, sign_y * y)
            for sign_x in (-1, 1)
            for sign_y in (-1, 1)
            for x, y in ((1.0, 0.32), (0.32, 1.0), (0.32, 0.32))
        ]
    ),
    "star": _star_corners(),
}


class Placed(NamedTuple):
    """An object in a scene; lengths in units of the image's side, y downwards."""

    form: str
    centre: Array
    """(2,): x and y."""
    radius: float
    angle: float
    """Tilt in radians."""

    def distance(self, x: Array, y: Array) -> Array:
        """Signed distance of points to its outline, of the shape of x and y; negative inside."""
        dx, dy = (x - self.centre[0]) / self.radius, (y - self.centre[1]) / self.radius
        turned_x = (np.cos(self.angle) * dx + np.sin(self.angle) * dy).astype(np.float32)
        turned_y = (np.cos(self.angle) * dy - np.sin(self.angle) * dx).astype(np.float32)
        distance: Array = FORMS[self.form](turned_x, turned_y) * self.radius
        return distance

    def corners(self) -> Array:
        """(N, 2), in the order of its form's `CORNERS`; those outside the image too."""
        x, y = CORNERS[self.form].T
        turned = np.stack(
            [
                np.cos(self.angle) * x - np.sin(self.angle) * y,
                np.sin(self.angle) * x + np.cos(self.angle) * y,
            ],
            axis=1,
        )
        placed: Array = self.centre + self.radius * turned
        return placed


def visible(objects: Sequence[Placed], index: int) -> NDArray[np.bool_]:
    """Which corners of an object a scene shows: (N,), those inside the image that no later object
    covers or all but touches. The objects come in the order in which they are painted."""
    corners = objects[index].corners()
    seen = np.all((corners > 0) & (corners < 1), axis=1)
    for later in objects[index + 1 :]:
        seen = seen & (later.distance(corners[:, 0], corners[:, 1]) > CLEAR)
    return np.asarray(seen)


def depth_order(objects: Sequence[Placed]) -> list[float]:
    """The depth of each object, in the order of painting: 1 where nothing covers it, otherwise one
    more than the farthest that covers it. Objects that do not meet have no order among them."""
    x, y = np.meshgrid(_FINE, _FINE)
    inside = [placed.distance(x, y) < 0 for placed in objects]
    depths: list[float] = []  # from the last object to the first
    for index in reversed(range(len(objects))):
        later = range(len(objects) - 1, index, -1)
        over = [
            depth
            for other, depth in zip(later, depths, strict=True)
            if (inside[index] & inside[other]).any()
        ]
        depths.append(1.0 + max(over, default=0.0))
    return depths[::-1]
