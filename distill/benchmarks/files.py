"""Images and masks as files: read them, pair them by name, and name the file that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks import IGNORE_INDEX
from distill.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"})
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
# What Pillow raises on damaged files, and on those that would fill the memory.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
INDEX_MODES = frozenset({"1", "L", "P", "I;16", "I"})


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: does not decode ({reason}); replace it or leave it out"
        ) from error


def read_image(path: Path) -> Tensor:
    """Read a picture as RGB, (3, H, W) uint8. Raises UserError on damaged and on deeper files."""
    image = _decode(path)
    if image.mode not in EIGHT_BIT_MODES:
        raise UserError(f"{path}: {image.mode!r} is not an 8-bit image; convert it to 8-bit RGB")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_mask(path: Path, classes: Mapping[int, int], size: tuple[int, int]) -> Tensor:
    """Read a mask, (H, W) uint8.

    Args:
        path: A file of one channel; its values, or palette indices, are looked up in `classes`.
        classes: From a value in the file to its class, or to `IGNORE_INDEX`.
        size: (H, W) of the image that the mask belongs to.

    Raises:
        UserError: The file is damaged, has colours, another size, or a value not in `classes`.
    """
    picture = _decode(path)
    if picture.mode not in INDEX_MODES:
        raise UserError(
            f"{path}: a mask has one channel of class numbers; this file's mode is {picture.mode!r}"
        )
    mask: NDArray[np.int64] = np.array(picture).astype(np.int64)
    if mask.shape != size:
        raise UserError(
            f"{path}: mask of {mask.shape[1]}x{mask.shape[0]} px, its image has {size[1]}x{size[0]}"
        )
    values = np.unique(mask)
    for value in values.tolist():
        if value not in classes:
            allowed = ", ".join(map(str, sorted(classes)))
            raise UserError(f"{path}: mask value {value} is not a class; allowed: {allowed}")
    of_value = np.full(int(values[-1]) + 1, IGNORE_INDEX, dtype=np.uint8)
    of_value[values] = [classes[value] for value in values.tolist()]
    return torch.from_numpy(of_value[mask])


def image_files(folder: Path) -> dict[str, Path]:
    """The images directly in a folder, by stem. A UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in files:
            raise UserError(f"{path} and {files[path.stem].name} have one name; keep one of them")
        files[path.stem] = path
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


class Pair(NamedTuple):
    """An image file and its mask file."""

    image: Path
    mask: Path


def read_pairs(names: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Pair]:
    """The pairs that a list file names, one a line, in its order.

    A line is a stem, a file name or a path, and may go on with other columns after a space: the
    lists of the SegNet release (image and mask path) and of Oxford Pets (class, species) are read.

    Raises:
        UserError: The file is missing, empty, or names an image that has no image or mask file.
    """
    if not names.is_file():
        raise UserError(f"there is no list file {names}; write one image name a line")
    pairs = []
    lines = names.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        stem = next((stem for stem in _possible_stems(line.strip()) if stem in images), None)
        if stem is None:
            raise UserError(f"{names}, line {number}: no image file is named {line.strip()!r}")
        if stem not in masks:
            raise UserError(
                f"{names}, line {number}: {images[stem].name} has no mask file {stem}.*"
            )
        pairs.append(Pair(images[stem], masks[stem]))
    if not pairs:
        raise UserError(f"{names} names no images; write one image name a line")
    return pairs


def _possible_stems(line: str) -> list[str]:
    """A stem may hold dots and blanks, so the longest reading comes first."""
    return [
        stem for entry in (line, line.split()[0]) for stem in (Path(entry).name, Path(entry).stem)
    ]


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of files, decoded when asked for. Items: image (3, H, W) uint8, mask (H, W) uint8.

    Args:
        pairs: The files.
        classes: From a mask file's value to its class, or to `IGNORE_INDEX`.
    """

    def __init__(self, pairs: Sequence[Pair], classes: Mapping[int, int]) -> None:
        self.pairs, self.classes = pairs, classes
        self.names = [pair.image.stem for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = read_image(pair.image)
        height, width = image.shape[1:]
        return image, read_mask(pair.mask, self.classes, (height, width))
