"""A predicted mask as files: class numbers with a palette, and a picture with its legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

VOID = (232, 232, 232)
SMALLEST = 256  # the longer side of an overlay: smaller images are enlarged
FONT = 13
ROW = 20
MARGIN = 10


def indexed(mask: NDArray[np.uint8], palette: Sequence[Sequence[int]]) -> Image.Image:
    """A picture whose pixels are class numbers. mask: (H, W); palette: RGB of each class."""
    picture = Image.fromarray(mask)  # grey values; the palette makes them indices
    picture.putpalette(_padded(palette))
    return picture


def overlay(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Image.Image:
    """The image under the colours of its classes, and beside it those that occur, largest first.

    Args:
        image: (H, W, 3) RGB.
        mask: (H, W) class numbers.
        class_names: Of each class.
        palette: RGB of each class.
    """
    mixed, legend = blend(image, mask, palette), shares(mask)
    lines = [f"{class_names[index]}  {share:.1%}" for index, share in legend.items()]
    font = ImageFont.load_default(FONT)
    widest = max(round(font.getlength(line)) for line in lines)
    size = (mixed.width + widest + ROW + 3 * MARGIN, max(mixed.height, ROW * len(lines) + MARGIN))
    picture = Image.new("RGB", size, "white")
    picture.paste(mixed)
    draw = ImageDraw.Draw(picture)
    left = mixed.width + MARGIN
    for row, (index, line) in enumerate(zip(legend, lines, strict=True)):
        top = MARGIN // 2 + row * ROW
        colour = tuple(palette[index])
        draw.rectangle((left, top + 2, left + 14, top + 16), fill=colour, outline="grey")
        draw.text((left + ROW + MARGIN // 2, top + 1), line, fill="black", font=font)
    return picture


def blend(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], palette: Sequence[Sequence[int]]
) -> Image.Image:
    """The image (H, W, 3) under the colours of its classes (H, W); small ones are enlarged."""
    colours = np.array(_padded(palette), dtype=np.uint8).reshape(256, 3)
    mixed = Image.fromarray(((image.astype(np.uint16) + colours[mask]) // 2).astype(np.uint8))
    scale = max(1, -(-SMALLEST // max(mixed.size)))
    return mixed.resize((scale * mixed.width, scale * mixed.height), Image.Resampling.NEAREST)


def shares(mask: NDArray[np.uint8]) -> dict[int, float]:
    """Which classes occur in a mask (H, W), largest first, and on what share of it."""
    counts = np.bincount(mask.ravel())
    order = np.argsort(-counts, kind="stable").tolist()
    return {index: float(counts[index] / mask.size) for index in order if counts[index]}


def _padded(palette: Sequence[Sequence[int]]) -> list[int]:
    """256 colours one after the other; those of no class are void."""
    return [value for colour in [*palette, *[VOID] * (256 - len(palette))] for value in colour]
