"""`shapes`: the embedded benchmark, textured scenes drawn on the fly from (seed, index).

A scene holds several overlapping objects, upright up to a tilt. The class of an object is its
form: the colours and textures of all objects and of the background come from one family, so that
nothing else tells.
The scene is drawn from parameters that do not know the image size: the same index at 32 and at
64 px is the same scene.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distill.errors import UserError, nearest

Array = NDArray[np.floating[Any]]


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
SPLITS = {"train": 0, "val": 1, "test": 2}


class Scene(NamedTuple):
    """One drawn scene. image: (H, W, 3) float32 in [0, 1]; mask: (H, W) uint8, 0 is background."""

    image: Array
    mask: NDArray[np.uint8]


@cache
def _grid(size: int) -> tuple[Array, Array]:
    """x and y of the pixel centres, each (size, size), in [0, 1]."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


@cache
def _upsampling(size: int, cells: int) -> Array:
    """(size, cells) matrix of linear interpolation from `cells` knots to the pixel centres."""
    position = (np.arange(size, dtype=np.float32) + 0.5) / size * (cells - 1)
    return np.clip(1.0 - np.abs(position[:, None] - np.arange(cells)[None, :]), 0.0, 1.0).astype(
        np.float32
    )


def _texture(generator: np.random.Generator, size: int) -> Array:
    """(size, size, 3) in [0, 1]: two colours mixed by soft noise or by stripes."""
    colour, other = generator.random((2, 3), dtype=np.float32)
    striped, angle, phase = generator.random() < 0.5, generator.random() * np.pi, generator.random()
    frequency = 2.0 + 3.0 * generator.random()
    knots = generator.random((4, 4), dtype=np.float32)
    mix = _upsampling(size, 4) @ knots @ _upsampling(size, 4).T
    if striped:
        x, y = _grid(size)
        along = np.cos(angle) * x + np.sin(angle) * y
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * (frequency * along + phase))
    blend: Array = colour + 0.4 * mix[..., None] * (other - colour)
    return blend


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """Draw scene `index` of a split: 2 or 3 objects, painted one over the other."""
    generator = np.random.default_rng([seed, SPLITS[split], index])
    image = _texture(generator, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    x, y = _grid(size)
    forms = list(FORMS.values())
    for _ in range(int(generator.integers(2, 4))):
        form = int(generator.integers(len(forms)))
        centre = 0.2 + 0.6 * generator.random(2)
        radius = 0.2 + 0.12 * generator.random()
        angle = np.pi / 9 * (2 * generator.random() - 1)  # tilted by up to 20 degrees
        texture = _texture(generator, size)
        dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
        turned_x = (np.cos(angle) * dx + np.sin(angle) * dy).astype(np.float32)
        turned_y = (np.cos(angle) * dy - np.sin(angle) * dx).astype(np.float32)
        pixels = forms[form](turned_x, turned_y) * radius * size  # distance to the outline
        cover = np.clip(0.5 - pixels, 0.0, 1.0)[..., None]
        image = cover * texture + (1.0 - cover) * image
        mask[pixels < 0] = form + 1
    image = image + 0.01 * generator.standard_normal((size, size, 3), dtype=np.float32)
    return Scene(np.clip(image, 0.0, 1.0).astype(np.float32), mask)


def presence_labels(mask: Tensor) -> Tensor:
    """Which forms a scene shows. mask: (H, W) int -> (len(FORMS),) bool."""
    return torch.stack([(mask == form + 1).any() for form in range(len(FORMS))])


class ShapesDataset(Dataset[tuple[Tensor, Tensor]]):
    """Scenes of one split. Items: image (3, S, S) uint8, mask (S, S) uint8 in 0..len(FORMS)."""

    def __init__(self, split: str, length: int, size: int, seed: int) -> None:
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        scene = draw_scene(self.seed, self.split, index, self.size)
        pixels = np.round(scene.image * 255.0).astype(np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(scene.mask)


class Shapes:
    """The embedded segmentation benchmark: seven classes, background and six forms.

    Args:
        root: Not used, there is nothing on disk.
        size: Side of the square images, 32 to 128 px.
        train: Number of training scenes.
        val: Number of validation scenes.
        test: Number of test scenes.
        seed: Seed of all scenes; the splits never share one.
    """

    name = "shapes"
    task: Literal["segmentation"] = "segmentation"
    class_names = ("background", *FORMS)
    num_classes = len(class_names)
    ignore_index = 255
    palette = np.array(
        [
            [40, 40, 48],
            [230, 97, 1],
            [94, 60, 153],
            [26, 150, 65],
            [215, 48, 100],
            [33, 160, 200],
            [240, 200, 40],
        ],
        dtype=np.uint8,
    )

    def __init__(
        self,
        root: str | None = None,
        *,
        size: int = 64,
        train: int = 20_000,
        val: int = 500,
        test: int = 1_000,
        seed: int = 0,
    ) -> None:
        if not 32 <= size <= 128:
            raise UserError(f"data.options.size: shapes are drawn at 32 to 128 px, not {size}")
        self.size, self.seed = size, seed
        self.lengths = {"train": train, "val": val, "test": test}
        for split, length in self.lengths.items():
            if length < 1:
                raise UserError(f"data.options.{split}: at least one scene is needed, not {length}")

    def dataset(self, split: str) -> ShapesDataset:
        """The scenes of `train`, `val` or `test`."""
        if split not in self.lengths:
            raise UserError(f"shapes has no split {split!r}; {nearest(split, self.lengths)}")
        return ShapesDataset(split, self.lengths[split], self.size, self.seed)
