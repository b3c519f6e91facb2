"""`shapes`: the embedded benchmark, textured scenes drawn on the fly from (seed, index).

A scene holds several overlapping objects, upright up to a tilt. The class of an object is its
form: the colours and textures of all objects and of the background come from one family, so that
nothing else tells.
The scene is drawn from parameters that do not know the image size: the same index at 32 and at
64 px is the same scene.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks.forms import (
    BACKGROUND,
    CORNERS,
    FORMS,
    Array,
    Placed,
    depth_order,
    visible,
)
from distill.benchmarks.geometric import KeypointPair
from distill.errors import UserError, nearest

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


class Drawing(NamedTuple):
    """A scene, and what it was drawn from."""

    scene: Scene
    objects: tuple[Placed, ...]
    """In the order of painting."""
    layers: NDArray[np.uint8]
    """(H, W): the number of the object that a pixel shows, from 1 in that order; 0 for none."""


def draw(seed: int, split: str, index: int, size: int) -> Drawing:
    """Draw scene `index` of a split: 2 or 3 objects, painted one over the other."""
    generator = np.random.default_rng([seed, SPLITS[split], index])
    image = _texture(generator, size)
    layers = np.zeros((size, size), dtype=np.uint8)
    x, y = _grid(size)
    forms, objects, classes = list(FORMS), list[Placed](), [0]
    for number in range(1, 1 + int(generator.integers(2, 4))):
        form = int(generator.integers(len(forms)))
        centre = 0.2 + 0.6 * generator.random(2)
        radius = 0.2 + 0.12 * generator.random()
        angle = np.pi / 9 * (2 * generator.random() - 1)  # tilted by up to 20 degrees
        texture = _texture(generator, size)
        objects.append(Placed(forms[form], centre, radius, angle))
        classes.append(form + 1)
        pixels = objects[-1].distance(x, y) * size  # distance to the outline
        cover = np.clip(0.5 - pixels, 0.0, 1.0)[..., None]
        image = cover * texture + (1.0 - cover) * image
        layers[pixels < 0] = number
    image = image + 0.01 * generator.standard_normal((size, size, 3), dtype=np.float32)
    mask = np.array(classes, dtype=np.uint8)[layers]
    scene = Scene(np.clip(image, 0.0, 1.0).astype(np.float32), mask)
    return Drawing(scene, tuple(objects), layers)


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """The scene of `draw` alone."""
    return draw(seed, split, index, size).scene


def _pixels(scene: Scene) -> Tensor:
    """Its image, (3, S, S) uint8."""
    pixels = np.round(scene.image * 255.0).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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
        return _pixels(scene), torch.from_numpy(scene.mask)


class ShapesDepths(ShapesDataset):
    """Scenes with depth. Items: image (3, S, S) uint8, depth (S, S) float32 (`depth_order`)."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        drawing = draw(self.seed, self.split, index, self.size)
        depths = np.array([BACKGROUND, *depth_order(drawing.objects)], dtype=np.float32)
        return _pixels(drawing.scene), torch.from_numpy(depths[drawing.layers])


class ShapesPairs:
    """Pairs of scenes with an object of one form, whose corners correspond.

    Pair i is of the i-th form that has corners, in turn; its two scenes are the first ones of a
    random order that show enough of the same ones. As many pairs as scenes.
    """

    SHARED = 3  # corners that both scenes show, at least

    def __init__(self, split: str, length: int, size: int, seed: int) -> None:
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> KeypointPair:
        if not 0 <= index < self.length:
            raise IndexError(index)
        form = list(CORNERS)[index % len(CORNERS)]
        generator = np.random.default_rng([self.seed, SPLITS[self.split], index, 1])
        before: list[tuple[int, Placed, NDArray[np.bool_]]] = []
        for scene in generator.permutation(self.length).tolist():
            for placed, seen in self._shown(scene, form):
                for other, source, known in before:
                    if other != scene and (known & seen).sum() >= self.SHARED:
                        return self._pair((other, source), (scene, placed), known & seen)
                before.append((scene, placed, seen))
        raise UserError(
            f"data.options.{self.split}: of {self.length} scenes, fewer than two show a {form}; "
            "draw some hundreds"
        )

    def _shown(self, scene: int, form: str) -> list[tuple[Placed, NDArray[np.bool_]]]:
        """The objects of a form, the foremost first, and which of their corners are seen."""
        objects = draw(self.seed, self.split, scene, 8).objects
        return [
            (placed, visible(objects, number))
            for number, placed in reversed(list(enumerate(objects)))
            if placed.form == form
        ]

    def _pair(
        self, one: tuple[int, Placed], other: tuple[int, Placed], shown: NDArray[np.bool_]
    ) -> KeypointPair:
        (first, source), (second, target) = one, other
        ends = torch.from_numpy(target.corners() * self.size).float()
        return KeypointPair(
            names=(f"{self.split}/{first}", f"{self.split}/{second}"),
            source=_pixels(draw_scene(self.seed, self.split, first, self.size)),
            target=_pixels(draw_scene(self.seed, self.split, second, self.size)),
            source_points=torch.from_numpy(source.corners()[shown] * self.size).float(),
            target_points=ends[torch.from_numpy(shown)],
            box=torch.cat([ends.amin(0), ends.amax(0)]).clamp(0, self.size),
            category=target.form,
        )


class Shapes:
    """The embedded benchmark: seven classes, background and six forms; and for the protocols of
    `distill.evaluation.geometry` corners that correspond, and a depth order.

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
    depth_range = (0.5, 4.5)
    depth_unit = "layers"
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
            raise UserError(f"data.options.size: must be 32 to 128 px, got {size}")
        self.size, self.seed = size, seed
        self.lengths = {"train": train, "val": val, "test": test}
        for split, length in self.lengths.items():
            if length < 1:
                raise UserError(f"data.options.{split}: must be at least 1 scene, got {length}")

    def dataset(self, split: str) -> ShapesDataset:
        """The scenes of `train`, `val` or `test`."""
        return ShapesDataset(split, self._length(split), self.size, self.seed)

    def depths(self, split: str) -> ShapesDepths:
        """The scenes of a split with their depth."""
        return ShapesDepths(split, self._length(split), self.size, self.seed)

    def pairs(self, split: str) -> ShapesPairs:
        """Pairs of scenes of a split, with corners that correspond."""
        return ShapesPairs(split, self._length(split), self.size, self.seed)

    def _length(self, split: str) -> int:
        if split not in self.lengths:
            raise UserError(f"shapes has no split {split!r}; {nearest(split, self.lengths)}")
        return self.lengths[split]
