"""`celebamask_hq`: parts of faces (Lee et al. 2020), 24,183 / 2,993 / 2,824 images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from distill.benchmarks import IGNORE_INDEX, notice
from distill.benchmarks.files import image_files, read_image, read_lines
from distill.benchmarks.published import Layout, Published, comma_separated
from distill.errors import UserError

# The order of the authors' g_mask.py: a later part covers an earlier one.
PARTS = comma_separated("""
    skin, nose, eye_g, l_eye, r_eye, l_brow, r_brow, l_ear, r_ear, mouth, u_lip, l_lip, hair, hat,
    ear_r, neck_l, neck, cloth
""")
MASKS_A_FOLDER = 2_000
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
LAYOUT = Layout(
    name="celebamask_hq",
    tree=(
        f"CelebAMask-HQ/{{CelebA-HQ-img/N.jpg, {MAPPING}, "
        "CelebAMask-HQ-mask-anno/{0,...,14}/NNNNN_PART.png}"
    ),
    source="the page at github.com/switchablenorms/CelebAMask-HQ",
    folder="CelebAMask-HQ",
    sizes={"train": 24_183, "val": 2_993, "test": 2_824},
)
# First number in CelebA of val, and of test.
CELEBA = (162_771, 182_638)


class Face(NamedTuple):
    """An image, and what the names of its part files begin with."""

    image: Path
    parts: Path


class Faces(Dataset[tuple[Tensor, Tensor]]):
    """Faces with the mask of their parts. Items: image (3, H, W) uint8, mask (H, W) uint8.

    Images have 1024 px, parts 512: an image is resized (antialiased) to the size of its parts.

    Args:
        faces: The files.
        background: The target where there is no part.
        first: The target of the first part.
    """

    def __init__(self, faces: Sequence[Face], background: int, first: int) -> None:
        self.faces, self.background, self.first = faces, background, first
        self.names = [face.image.stem for face in faces]

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = self.faces[index]
        mask: Tensor | None = None
        for target, part in enumerate(PARTS, start=self.first):
            file = face.parts.with_name(f"{face.parts.name}_{part}.png")
            if not file.exists():
                continue  # this face does not show it
            inside = read_image(file)[0] > 0
            if mask is None:
                mask = torch.full_like(inside, self.background, dtype=torch.uint8)
            if inside.shape != mask.shape:
                height, width = mask.shape
                raise UserError(f"{file}: must be {width}x{height} px, like the parts before it")
            mask[inside] = target
        if mask is None:
            raise UserError(f"{face.image}: there is no part file {face.parts}_*.png")
        return F.resize(read_image(face.image), list(mask.shape), antialias=True), mask


def _numbers(base: Path, images: Mapping[str, Path]) -> dict[str, list[int]]:
    """The image numbers of each split."""
    mapping, numbers = base / MAPPING, {split: list[int]() for split in LAYOUT.sizes}
    if not mapping.is_file():
        train, val = LAYOUT.sizes["train"], LAYOUT.sizes["val"]
        for number in range(sum(LAYOUT.sizes.values())):
            if str(number) in images:
                numbers[_split_of(number, train, train + val)].append(number)
        notice(f"celebamask_hq: no {MAPPING}; split by number, not as published")
        return numbers
    for number, line in enumerate(read_lines(mapping), start=1):
        columns = line.split()
        if not columns or columns[0] == "idx":
            continue
        if len(columns) != 3 or not (columns[0].isdecimal() and columns[1].isdecimal()):
            raise UserError(
                f"{mapping}, line {number}: expected 'idx orig_idx orig_file', got {line!r}"
            )
        numbers[_split_of(int(columns[1]), *CELEBA)].append(int(columns[0]))
    listed = [number for split in numbers.values() for number in split]
    missing = [number for number in listed if str(number) not in images]
    if missing:
        raise UserError(
            f"{mapping} lists {missing[0]}.jpg, which is not in CelebA-HQ-img "
            f"({len(missing)} of {len(listed)} images are missing)"
        )
    return numbers


def _split_of(number: int, val: int, test: int) -> str:
    return "train" if number < val else "val" if number < test else "test"


def _faces(base: Path, images: Mapping[str, Path], numbers: Sequence[int]) -> list[Face]:
    masks = base / "CelebAMask-HQ-mask-anno"
    folders = {number // MASKS_A_FOLDER for number in numbers}
    missing = sorted(folder for folder in folders if not (masks / str(folder)).is_dir())
    if missing:
        raise UserError(f"there is no folder {masks / str(missing[0])}")
    return [
        Face(images[str(number)], masks / str(number // MASKS_A_FOLDER) / f"{number:05}")
        for number in numbers
    ]


def celebamask_hq(root: str | None, *, classes: int = 19) -> Published:
    """Faces in the split of CelebA, as the authors' g_partition.py draws it.

    Without the mapping file, images 0 to 24182 are train, to 27175 val, to 29999 test.

    Args:
        root: Folder of `CelebAMask-HQ/`, or that folder.
        classes: 19, background and 18 parts; or 18, the parts alone, background not scored.
    """
    if classes not in (18, 19):
        raise UserError(
            f"data.options.classes: must be 18 (only parts) or 19 (with background), got {classes}"
        )
    background, first = (0, 1) if classes == 19 else (IGNORE_INDEX, 0)
    with LAYOUT.at(root) as base:
        images = image_files(base / "CelebA-HQ-img")
        splits = {
            split: Faces(_faces(base, images, numbers), background, first)
            for split, numbers in _numbers(base, images).items()
        }
    names = ("background", *PARTS) if classes == 19 else PARTS
    return LAYOUT.benchmark(
        splits, task="segmentation", class_names=names, mirrored=_mirrored(names)
    )


def _mirrored(names: Sequence[str]) -> tuple[int, ...]:
    """In the mirror a left eye, brow or ear is a right one."""
    becomes = {name: name for name in names}
    for part in ("eye", "brow", "ear"):
        becomes |= {f"l_{part}": f"r_{part}", f"r_{part}": f"l_{part}"}
    return tuple(names.index(becomes[name]) for name in names)
