"""Images as files: find them, read them, pair them by name, and name the file that is wrong."""

from __future__ import annotations

import os
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from distill.errors import UserError, one_line

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
# What Pillow raises on damaged files, and on those that would fill the memory.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by its EXIF orientation."""


def decode(path: Path, upright: bool = False) -> Image.Image:
    """Load a file, turned as its camera noted if `upright`; its `info` has `stored`, what
    `stored_as` says. UserError on damaged, deeper ones."""
    try:
        with Image.open(path) as image:
            deep = is_cut(image)
            image.info["stored"] = stored_as(image)
            image.filename = ""  # else Pillow maps grey TIFFs into memory, and turns them wrongly
            image.load()
            image.info.pop("transparency", None)  # what is seen through is of its own colour
            turned = TURNED.get(_orientation(image)) if upright else None
            picture = image if turned is None else image.transpose(turned)
    except UNREADABLE as error:
        reason = one_line(error)
        raise UserError(
            f"{path}: cannot be decoded ({reason}); replace it or leave it out"
        ) from error
    if deep:
        raise UserError(f"{path}: has 16-bit colours; convert it to 8-bit RGB")
    return picture


def is_cut(image: ImageFile.ImageFile) -> bool:
    """Whether an image, opened and not yet loaded, has colours of more than the 8 bits that Pillow
    keeps of them: their mode is that of 8-bit ones, what its decoder is told is not."""
    if image.mode not in EIGHT_BIT_MODES:
        return False
    raw, largest = stored_as(image)
    return ";16" in raw or (largest or 0) > 255


def stored_as(image: ImageFile.ImageFile) -> tuple[str, int | None]:
    """The mode that the decoder of an opened image reads, such as `L;4` for 4 bits, and the largest
    value of a portable map (PGM, PPM), None for other files. The image must not be loaded yet."""
    if not image.tile:
        return "", None
    codec, _, _, args = image.tile[0]
    raw, *more = args if isinstance(args, tuple) else (args,)
    return str(raw), more[0] if more and codec.startswith("ppm") else None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (tag 274); 1, as stored, if it cannot be read."""
    try:
        return int(image.getexif().get(274, 1))
    except (*UNREADABLE, struct.error, KeyError, TypeError, IndexError):
        return 1


def read_image(path: Path, upright: bool = False) -> Tensor:
    """Read a picture as RGB, (3, H, W) uint8. Raises UserError on damaged and on deeper files.

    Args:
        path: The file.
        upright: Turn it as its camera noted. The masks of benchmarks lie over pixels as stored.
    """
    image = decode(path, upright)
    if image.mode not in EIGHT_BIT_MODES:
        raise UserError(f"{path}: {image.mode!r} is not an 8-bit image; convert it to 8-bit RGB")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def image_files(folder: Path) -> dict[str, Path]:
    """The images directly in a folder, by stem (`composed`). Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        stem = composed(path.stem)
        if stem in files:
            raise UserError(f"{path} and {files[stem].name} have the same name; keep one of them")
        files[stem] = path
    if not files:
        raise UserError(f"{folder} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def composed(name: str) -> str:
    """A name with its accents in the letters (NFC); macOS writes some of them apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"{error.strerror}: {error.filename}") from error


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in the order of their paths, and no pipes or devices; links to
    folders are followed, and what several of them lead to comes once. Files and folders that begin
    with a dot are left out.

    A UserError where a folder cannot be read.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    # a link that leads nowhere is a file that does not open
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def images_below(folder: Path) -> list[Path]:
    """The images among `files_below`."""
    return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def tagged_files(folder: Path, tag: str) -> dict[str, Path]:
    """The files below a folder whose names end with a tag, by what stands before it (`composed`).

    A UserError where there are none.
    """
    files = {
        composed(path.name.removesuffix(tag)): path
        for path in files_below(folder)
        if path.name.endswith(tag)
    }
    if not files:
        raise UserError(f"there is no {folder}/**/*{tag}")
    return files


class Pair(NamedTuple):
    """An image file and its mask file."""

    image: Path
    mask: Path


def read_pairs(names: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Pair]:
    """The pairs that a list file names, one per line, in its order.

    A line is a stem, a file name or a path, and may go on with other columns after a space: the
    lists of the SegNet release (image and mask path) and of Oxford Pets (class, species) are read.

    Raises:
        UserError: The file is missing, empty, names an image twice, or one that has no image or
            mask file.
    """
    if not names.is_file():
        raise UserError(f"there is no list file {names}; write one image name per line")
    pairs, problems = [], []
    listed: dict[str, int] = {}
    for number, line in enumerate(read_lines(names), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        stem = next(
            (stem for stem in _possible_stems(composed(line.strip())) if stem in images), None
        )
        if stem in listed:
            raise UserError(f"{names}, line {number}: {stem!r} is also in line {listed[stem]}")
        if stem is None:
            problems.append(f"{names}, line {number}: no image file is named {line.strip()!r}")
        elif stem not in masks:
            problems.append(
                f"{names}, line {number}: {images[stem].name} has no mask file {stem}.*"
            )
        else:
            listed[stem] = number
            pairs.append(Pair(images[stem], masks[stem]))
    if problems:
        count = f" ({len(problems)} of {len(problems) + len(pairs)} listed images are incomplete)"
        raise UserError(problems[0] + count)
    if not pairs:
        raise UserError(f"{names} lists no images; write one image name per line")
    return pairs


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, UTF-8 with or without a mark of it. A UserError where it is not."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}; save it as UTF-8") from error


def pair_all(images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Pair]:
    """Each image with the mask of its name. A UserError where an image has none."""
    bare = [name for name in images if name not in masks]
    if bare:
        raise UserError(
            f"{images[bare[0]]} has no mask of the same name ({len(bare)} of {len(images)} "
            "images have none)"
        )
    return [Pair(image, masks[name]) for name, image in images.items()]


def _possible_stems(line: str) -> list[str]:
    """Names and folders may hold dots and blanks: the whole line comes first, then its first
    column, then what follows its last slash; that before the column where it alone is a file."""
    column, path = Path(line.split()[0]), Path(line)
    names = [column.name, path.name]
    if column.suffix.lower() not in IMAGE_SUFFIXES and path.suffix.lower() in IMAGE_SUFFIXES:
        names.reverse()
    stems = []
    for entry in (line, *names):
        stems.append(entry)
        if Path(entry).suffix.lower() in IMAGE_SUFFIXES:
            stems.append(entry.removesuffix(Path(entry).suffix))
    return stems


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Image files of known classes, decoded when asked for, upright. Items: image (3, H, W) uint8,
    class.

    Args:
        root: The folder that `names` are relative to.
        samples: Path, below `root`, and class of each image.
    """

    def __init__(self, root: Path, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples
        self.paths = [path for path, _ in samples]
        self.targets = [target for _, target in samples]
        self.names = [Path(path).relative_to(root).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(Path(self.paths[index]), upright=True), self.targets[index]
