"""`wflw`: 98 landmarks of faces (Wu et al. 2018), 7,500 / 2,500 faces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks import distinct_colours, hold_out_share
from distill.benchmarks.files import read_image, read_lines
from distill.benchmarks.published import Layout, Published
from distill.errors import UserError

POINTS = 98
COLUMNS = 2 * POINTS + 4 + 6 + 1  # points, rectangle, attributes, name of the image
LISTS = "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{}.txt"
LAYOUT = Layout(
    name="wflw",
    tree=f"WFLW_images/EVENT/*.jpg and {LISTS.format('{train,test}')}",
    source="wywu.github.io/projects/LAB/WFLW.html (WFLW_images.tar.gz, WFLW_annotations.tar.gz)",
)
SIZES = {"train": 7_500, "test": 2_500}  # with val
# Parts of the face as the figure on that page numbers them; left and right are the picture's.
PARTS = {
    "contour": range(33),
    "left brow": range(33, 42),
    "right brow": range(42, 51),
    "nose": range(51, 60),
    "left eye": range(60, 68),
    "right eye": range(68, 76),
    "mouth": range(76, 96),
    "left pupil": range(96, 97),
    "right pupil": range(97, 98),
}
# Lines of points that the mirror lays on each other, or on themselves, the first on the last. In
# that figure contour and upper edges run from left to right and lower edges back, in both brows and
# eyes alike; the ridge of the nose runs down the middle.
MIRRORED = (
    (range(33), range(33)),
    (range(33, 38), range(42, 47)),  # upper edges of the brows
    (range(38, 42), range(47, 51)),  # lower edges
    (range(55, 60), range(55, 60)),  # below the nose
    (range(60, 65), range(68, 73)),  # eyes, from corner to corner above
    (range(65, 68), range(73, 76)),  # and back below
    (range(76, 83), range(76, 83)),  # mouth, outside, above
    (range(83, 88), range(83, 88)),  # and below
    (range(88, 93), range(88, 93)),  # inside, above
    (range(93, 96), range(93, 96)),  # and below
    (range(96, 97), range(97, 98)),  # pupils
)


def _mirrored() -> tuple[int, ...]:
    becomes = list(range(POINTS))
    for first, second in MIRRORED:
        for left, right in zip(first, reversed(second), strict=True):
            becomes[left], becomes[right] = right, left
    return tuple(becomes)


class Face(NamedTuple):
    """A line of a list."""

    name: str
    """The image's, and the number of the line, as an image may have several faces."""
    image: Path
    points: Tensor
    """(98, 2) float32, in pixels of the image."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the face."""


class Faces(Dataset[tuple[Tensor, Tensor]]):
    """Faces, cut out when asked for. Items: image (3, S, S) uint8, points (98, 2) float32 as shares
    of S.

    Args:
        faces: Where they are.
        margin: By how much the square that is cut out is larger than the box's longer side.
    """

    def __init__(self, faces: Sequence[Face], margin: float) -> None:
        self.faces, self.margin = faces, margin
        self.names = [face.name for face in faces]

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = self.faces[index]
        left, top, right, bottom = face.box
        side = max(1, math.ceil((1 + self.margin) * max(right - left, bottom - top)))
        x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
        image = read_image(face.image)
        height, width = image.shape[1:]
        if x >= width or y >= height or x + side <= 0 or y + side <= 0:
            raise UserError(f"{face.image}: the rectangle of {face.name} is outside the image")
        rows, columns = _reflected(y, side, height), _reflected(x, side, width)
        points = (face.points - torch.tensor([x, y])) / side
        return image[:, rows][:, :, columns].contiguous(), points


def _reflected(start: int, count: int, length: int) -> Tensor:
    """The indices from `start` on, (count,), mirrored at both ends of an axis."""
    places = torch.arange(start, start + count) % (2 * length)
    return torch.minimum(places, 2 * length - 1 - places)


@dataclass(frozen=True, kw_only=True)
class WFLW(Published):
    """Its benchmark (`distill.benchmarks.LandmarkBenchmark`)."""

    mirrored: tuple[int, ...] = _mirrored()
    eyes: tuple[int, int] = (60, 72)


def _read_list(path: Path, images: Path) -> list[Face]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    faces = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split()
        if not columns:
            continue
        try:
            if len(columns) != COLUMNS:
                raise ValueError(f"expected {COLUMNS} columns, got {len(columns)}")
            numbers = np.array(columns[: 2 * POINTS + 4], dtype=np.float32)
            if not np.isfinite(numbers).all():
                raise ValueError("a number is not finite")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        points = torch.from_numpy(numbers[: 2 * POINTS]).reshape(POINTS, 2)
        left, top, right, bottom = numbers[2 * POINTS :].tolist()
        box = (left, top, right, bottom)
        faces.append(Face(f"{columns[-1]}:{number}", images / columns[-1], points, box))
    if not faces:
        raise UserError(f"{path} lists no faces")
    missing = sorted({str(face.image) for face in faces if not face.image.is_file()})
    if missing:
        raise UserError(f"{path} lists {missing[0]}, which is missing ({len(missing)} are)")
    return faces


def wflw(
    root: str | None, *, margin: float = 0.25, val_ratio: float = 0.1, split_seed: int = 0
) -> WFLW:
    """Faces with 98 points, in the published split; val is held out of train.

    Args:
        root: Folder of `WFLW_images/` and `WFLW_annotations/`.
        margin: By how much the square that is cut out is larger than the longer side of the
            published rectangle of the face; a quarter, as HRNet does it (Sun et al. 2019).
        val_ratio: Share of the training images held out for val, with all their faces.
        split_seed: Chooses them.
    """
    if not margin >= 0:
        raise UserError(f"data.options.margin: must be at least 0, got {margin}")
    with LAYOUT.at(root) as base:
        listed, test = (
            _read_list(base / LISTS.format(split), base / "WFLW_images")
            for split in ("train", "test")
        )
    images = list(dict.fromkeys(face.image for face in listed))
    held = set(hold_out_share(images, val_ratio, split_seed, "data.options.val_ratio")[1])
    train = [face for face in listed if face.image not in held]
    val = [face for face in listed if face.image in held]
    splits = {"train": Faces(train, margin), "val": Faces(val, margin), "test": Faces(test, margin)}
    LAYOUT.compare_sizes({"train": len(listed), "test": len(test)}, SIZES)
    names = tuple(f"{part} {index}" for part, numbers in PARTS.items() for index in numbers)
    return WFLW(
        name=LAYOUT.name,
        task="landmarks",
        class_names=names,
        palette=distinct_colours(POINTS),
        splits=splits,
    )
