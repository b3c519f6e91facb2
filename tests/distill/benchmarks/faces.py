"""Drawn faces in WFLW's layout: 98 points each, in the order of the figure on its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
LISTS = "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{}.txt"


def line(begin: tuple[float, float], end: tuple[float, float], count: int) -> Points:
    return np.linspace(begin, end, count)


def arc(left: float, right: float, y: float, height: float, count: int) -> Points:
    """From left to right over a bow: upwards if the height is negative."""
    t = np.linspace(0, np.pi, count)
    middle, reach = (left + right) / 2, (right - left) / 2
    return np.stack([middle - reach * np.cos(t), y + height * np.sin(t)], axis=1)


def almond(left: float, right: float, y: float, height: float, upper: int, lower: int) -> Points:
    """An upper edge from corner to corner, and the lower one back between them."""
    below = arc(left, right, y, height, lower + 2)[-2:0:-1]
    return np.concatenate([arc(left, right, y, -height, upper), below])


def brow(left: float, right: float) -> Points:
    below = line((right - 0.02, 0.29), (left + 0.02, 0.29), 4)
    return np.concatenate([arc(left, right, 0.27, -0.04, 5), below])


def face(mouth: float = 0.06) -> Points:
    """A face that looks straight ahead, (98, 2), symmetric in x to 0.5; `mouth` opens it."""
    return np.concatenate(
        [
            arc(0.1, 0.9, 0.4, 0.5, 33),
            brow(0.18, 0.42),
            brow(0.58, 0.82),
            line((0.5, 0.36), (0.5, 0.54), 4),
            arc(0.42, 0.58, 0.58, 0.03, 5),
            almond(0.22, 0.42, 0.38, 0.04, 5, 3),
            almond(0.58, 0.78, 0.38, 0.04, 5, 3),
            almond(0.35, 0.65, 0.72, mouth, 7, 5),
            almond(0.4, 0.6, 0.72, mouth / 2, 5, 3),
            [(0.32, 0.38), (0.68, 0.38)],
        ]
    )


def posed(rng: np.random.Generator, size: int, turn: float = 25.0) -> Points:
    """A face in pixels of a square image, turned by up to `turn` degrees."""
    angle = np.radians(rng.uniform(-turn, turn))
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = rng.uniform(0.8, 1.2, 2)
    points = (face(rng.uniform(0.02, 0.1)) - 0.5) * stretch @ turned.T
    return np.asarray((points * rng.uniform(0.5, 0.65) + 0.5 + rng.uniform(-0.06, 0.06, 2)) * size)


def drawn(points: Points, size: int, rng: np.random.Generator) -> Image.Image:
    """A picture of the points of a face."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(60, 140, 3).tolist()))
    draw = ImageDraw.Draw(picture)

    def fill(first: int, last: int, colour: tuple[int, int, int]) -> None:
        draw.polygon([tuple(xy) for xy in (points[first:last] - 0.5).tolist()], fill=colour)

    fill(0, 33, (224, 180, 150))
    for first, last in ((33, 42), (42, 51)):
        fill(first, last, (90, 60, 40))
    for first, last in ((60, 68), (68, 76)):
        fill(first, last, (250, 250, 250))
    fill(76, 88, (190, 40, 60))
    fill(88, 96, (60, 10, 20))
    draw.line([tuple(xy) for xy in (points[51:55] - 0.5).tolist()], fill=(150, 100, 80), width=2)
    for x, y in (points[96:] - 0.5).tolist():
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(20, 20, 20))
    return picture


def entry(points: Points, name: str) -> str:
    """A line of a list: points, the rectangle around them, six attributes, the image."""
    box = [*points.min(axis=0), *points.max(axis=0)]
    numbers = " ".join(f"{value:.6f}" for value in points.ravel())
    return f"{numbers} {' '.join(str(round(value)) for value in box)} 0 0 0 0 0 0 {name}\n"


def wflw(root: Path, train: int = 6, test: int = 2, size: int = 96) -> None:
    """So many drawn faces, one an image, in the layout in which the two archives unpack."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        lines = []
        for index in range(count):
            name = f"{split}--Event/{index}.png"
            path, points = root / "WFLW_images" / name, posed(rng, size)
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn(points, size, rng).save(path)
            lines.append(entry(points, name))
        path = root / LISTS.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
