"""A predicted mask as files: class numbers with a palette, and a picture with its legend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

VOID = (232, 232, 232)
SMALLEST = 256  # the longer side of an overlay: smaller images are enlarged
ALPHA = 0.5  # of a class's colour over the image; its outline has it pure
BRIGHT = 0.6  # mean of the grey image below, 1 being white: dark ones are lifted to it
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
        class_names: The name of each class.
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


def blend(image: NDArray[np.uint8], mask: NDArray[np.uint8], palette: ArrayLike) -> Image.Image:
    """The image in bright grey under the colours of its classes, each with its outline.

    A pixel of no class keeps the grey. Small images are enlarged.

    Args:
        image: (H, W, 3) RGB.
        mask: (H, W) class numbers.
        palette: (C, 3) RGB of each class.
    """
    scale = max(1, -(-SMALLEST // max(mask.shape)))
    grey, classes = (
        np.repeat(np.repeat(array, scale, axis=0), scale, axis=1)
        for array in (_bright(image), mask)
    )
    below = 255 * grey[..., None]
    colours = np.asarray(palette, dtype=np.float64)
    known = classes < len(colours)
    above = colours[np.where(known, classes, 0)]
    outline = _outline(classes, max(1, round(max(classes.shape) / 400)))
    weight = np.where(outline, 1.0, ALPHA) * known
    mixed = below + weight[..., None] * (above - below)
    return Image.fromarray(mixed.astype(np.uint8))


def _bright(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Grey values (H, W) of an image (H, W, 3), from 0 to 1, the dark parts of it lifted."""
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float64) / 255
    low, high = np.percentile(grey, (1, 99))
    if high - low < 0.01:  # no contrast to stretch
        return grey
    grey = ((grey - low) / (high - low)).clip(0, 1)
    lifted: NDArray[np.float64] = grey ** min(1.0, math.log(BRIGHT) / math.log(grey.mean()))
    return lifted


def _outline(mask: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """The pixels (H, W) of a mask within `width` of another class along an axis, as booleans."""
    near = np.zeros(mask.shape, dtype=np.bool_)
    for step in range(1, width + 1):
        below = mask[step:] != mask[:-step]
        beside = mask[:, step:] != mask[:, :-step]
        near[step:] |= below
        near[:-step] |= below
        near[:, step:] |= beside
        near[:, :-step] |= beside
    return near


def shares(mask: NDArray[np.uint8]) -> dict[int, float]:
    """The classes in a mask (H, W) with their shares of it, largest first."""
    counts = np.bincount(mask.ravel())
    order = np.argsort(-counts, kind="stable").tolist()
    return {index: float(counts[index] / mask.size) for index in order if counts[index]}


def _padded(palette: Sequence[Sequence[int]]) -> list[int]:
    """256 colours one after the other; those of no class are void."""
    return [value for colour in [*palette, *[VOID] * (256 - len(palette))] for value in colour]
