"""Masks as files: of numbers, of colours and of depths, over the images that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks.files import EIGHT_BIT_MODES, Pair, decode, read_image
from distill.errors import UserError

DEEP_MODES = frozenset({"I;16", "I;16B", "I"})
INDEX_MODES = frozenset({"1", "L", "P"}) | DEEP_MODES

Colour = tuple[int, int, int]
MaskReader = Callable[[Path, tuple[int, int]], Tensor]
"""Function that reads the mask of an image of size (H, W) from a file: (H, W) uint8."""


class _OtherSizeError(UserError):
    """A mask that is not of the size of its image."""


def _decode_mask(path: Path, size: tuple[int, int], upright: bool = False) -> Image.Image:
    picture = decode(path, upright)
    if picture.size != size[::-1]:
        raise _OtherSizeError(
            f"{path}: the mask is {picture.height}x{picture.width} px (height x width), but its "
            f"image is {size[0]}x{size[1]}"
        )
    raw, largest = picture.info["stored"]
    if largest not in (None, 255, 65_535):
        raise UserError(
            f"{path}: its values are scaled (its largest is {largest}); save it with 255 or "
            "65535 as the largest, or as PNG"
        )
    # What Pillow spreads to 8 bits is made the numbers that the file holds.
    spread = {"L;2": 85, "L;4": 17}.get(raw[:3], 1)
    return picture if spread == 1 else picture.point([value // spread for value in range(256)])


def read_mask(
    path: Path, size: tuple[int, int], classes: Mapping[int, int], upright: bool = False
) -> Tensor:
    """Read a mask of numbers, (H, W) uint8.

    Args:
        path: A file of one channel, of up to 16 bits; its values, or palette indices, are looked up
            in `classes`.
        size: (H, W) of the image that the mask belongs to.
        classes: From a value in the file to its class, or to `IGNORE_INDEX`.
        upright: Turn it as its camera noted, as its image is.

    Raises:
        UserError: The file is damaged, has colours, another size, or a value not in `classes`.
    """
    picture = _decode_mask(path, size, upright)
    if picture.mode not in INDEX_MODES:
        raise UserError(
            f"{path}: a mask must have one channel of class numbers; this file's mode is "
            f"{picture.mode!r} (benchmark folder reads colours with data.options.palette)"
        )
    mask, stranger = _look_up(np.array(picture).astype(np.int64), classes)
    if stranger is not None:
        allowed = _ranges(classes)
        raise UserError(f"{path}: mask value {stranger} is not a class; allowed: {allowed}")
    return mask


def read_deep(path: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """Read a file of one channel of 16 bits, such as a depth, (H, W); its image has that `size`.

    Raises:
        UserError: The file is damaged, has another size, or fewer bits.
    """
    picture = _decode_mask(path, size)
    if picture.mode not in DEEP_MODES:
        raise UserError(
            f"{path}: a depth file must have one 16-bit channel; this file's mode is "
            f"{picture.mode!r}"
        )
    return np.array(picture).astype(np.float32)


def read_colour_mask(
    path: Path, size: tuple[int, int], classes: Mapping[Colour, int], upright: bool = False
) -> Tensor:
    """Read a mask of colours, (H, W) uint8; `read_mask` says what may be wrong with it.

    Args:
        path: A file of any mode that has RGB colours, also through a palette.
        size: (H, W) of the image that the mask belongs to.
        classes: From a colour to its class, or to `IGNORE_INDEX`.
        upright: Turn it as its camera noted, as its image is.
    """
    picture = _decode_mask(path, size, upright)
    if picture.mode not in EIGHT_BIT_MODES:
        raise UserError(
            f"{path}: a colour mask must be 8-bit; this file's mode is {picture.mode!r}"
        )
    rgb = np.array(picture.convert("RGB")).astype(np.int64)
    packed = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    table = {r << 16 | g << 8 | b: target for (r, g, b), target in classes.items()}
    mask, stranger = _look_up(packed, table)
    if stranger is not None:
        colour = f"{stranger >> 16} {stranger >> 8 & 255} {stranger & 255}"
        raise UserError(f"{path}: colour {colour} is not one of the {len(classes)} in the palette")
    return mask


def _look_up(values: NDArray[np.int64], classes: Mapping[int, int]) -> tuple[Tensor, int | None]:
    """The class of each value, and the first value that is in no class."""
    known = np.array(sorted(classes))
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    strangers = values[known[index] != values]
    class_of = np.array([classes[value] for value in known.tolist()], dtype=np.uint8)
    return torch.from_numpy(class_of[index]), int(strangers[0]) if strangers.size else None


def _ranges(values: Iterable[int]) -> str:
    """Numbers for people: {0, 1, 2, 3, 255} -> "0 to 3, 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of files, decoded when asked for. Items: image (3, H, W) uint8, mask (H, W) uint8.

    Args:
        pairs: The files.
        read: Reads a mask, such as `read_mask` with its classes.
        upright: Turn images as their cameras noted: the masks lie over what viewers show.
    """

    def __init__(self, pairs: Sequence[Pair], read: MaskReader, upright: bool = False) -> None:
        self.pairs, self.read, self.upright = pairs, read, upright
        self.names = [pair.image.stem for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = read_image(pair.image, self.upright)
        height, width = image.shape[1:]
        try:
            return image, self.read(pair.mask, (height, width))
        except _OtherSizeError as error:
            with Image.open(pair.image) as stored:
                turned = self.upright and stored.size != (width, height)
            hint = f"; {pair.image.name} is rotated by its EXIF orientation; save both upright"
            raise UserError(f"{error}{hint if turned else ''}") from error
