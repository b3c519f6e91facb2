"""`nyuv2`: rooms with measured depth (Silberman et al. 2012), in the release of BTS (Lee et al.
2019) that AdaBins and later work train and score on: 24,231 / 654 images of 480x640 px."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks import Examples, hold_out_share
from distill.benchmarks.files import Pair, read_image, read_lines
from distill.benchmarks.masks import read_deep
from distill.benchmarks.published import Layout
from distill.errors import UserError, nearest

LAYOUT = Layout(
    name="nyuv2",
    tree=(
        "sync/SCENE/{rgb_*.jpg,sync_depth_*.png}, "
        "official_splits/test/SCENE/{rgb_*.jpg,sync_depth_*.png} and "
        "nyudepthv2_{train,test}_files_with_gt.txt"
    ),
    source="github.com/cleinc/bts (its lists lie in train_test_inputs)",
    sizes={"train": 24_231, "test": 654},
)
FOLDERS = {"train": "sync", "test": "official_splits/test"}
FARTHEST = 10.0
# Eigen et al. 2014 score this part of an image of 480x640 px: rows, columns.
EIGEN_CROP = (slice(45, 471), slice(41, 601))
MILLIMETRES = 1000.0


class DepthImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with depth, decoded when asked for: (3, H, W) uint8, (H, W) float32 in metres.

    Args:
        pairs: The files.
        cropped: Whether depth outside `EIGEN_CROP` is NaN, as what is not measured is.
    """

    def __init__(self, pairs: Sequence[Pair], cropped: bool) -> None:
        self.pairs, self.cropped = pairs, cropped
        self.names = [f"{pair.image.parent.name}/{pair.image.stem}" for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = read_image(pair.image)
        depth = read_deep(pair.mask, (image.shape[1], image.shape[2])) / MILLIMETRES
        known = (depth > 0.001) & (depth < FARTHEST)
        if self.cropped:
            known &= _inside(depth.shape, EIGEN_CROP)
        return image, torch.from_numpy(np.where(known, depth, np.nan).astype(np.float32))


def _inside(shape: tuple[int, ...], crop: tuple[slice, slice]) -> NDArray[np.bool_]:
    inside = np.zeros(shape, dtype=np.bool_)
    inside[crop] = True
    return inside


def _listed(base: Path, split: str) -> list[Pair]:
    """The pairs of a list file (image, depth and focal length per line) in the split's folder."""
    names, folder = base / f"nyudepthv2_{split}_files_with_gt.txt", base / FOLDERS[split]
    if not names.is_file():
        raise UserError(f"there is no list file {names}")
    pairs = []
    for number, line in enumerate(read_lines(names), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise UserError(
                f"{names}, line {number}: expected an image and a depth file, got {line!r}"
            )
        pair = Pair(*(folder / word.lstrip("/") for word in words[:2]))
        for path in pair:
            if not path.is_file():
                raise UserError(f"{names}, line {number}: there is no file {path}")
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{names} lists no images")
    return pairs


def _room(pair: Pair) -> str:
    """basement_0001a and basement_0001b are scenes of the room basement_0001."""
    return re.sub(r"(?<=\d)[a-z]$", "", pair.image.parent.name)


class NYUv2:
    """Depth in metres up to 10; what is not measured is not scored.

    Args:
        root: Folder of `sync/` and `official_splits/`.
        val_ratio: Share of the rooms of train that are held out for val, chosen by `split_seed`.
            The release has no val.
        split_seed: Chooses them.
    """

    name = "nyuv2"
    depth_range = (0.001, FARTHEST)
    depth_unit = "m"

    def __init__(self, root: str | None, *, val_ratio: float = 0.05, split_seed: int = 0) -> None:
        with LAYOUT.at(root) as base:
            listed = {split: _listed(base, split) for split in FOLDERS}
        rooms = sorted({_room(pair) for pair in listed["train"]})
        held = set(hold_out_share(rooms, val_ratio, split_seed, "data.options.val_ratio")[1])
        val = [pair for pair in listed["train"] if _room(pair) in held]
        train = [pair for pair in listed["train"] if _room(pair) not in held]
        LAYOUT.compare_sizes({split: len(pairs) for split, pairs in listed.items()})
        self.splits: Mapping[str, Examples] = {
            "train": DepthImages(train, cropped=False),
            "val": DepthImages(val, cropped=True),
            "test": DepthImages(listed["test"], cropped=True),
        }

    def depths(self, split: str) -> Examples:
        """The images of a split; scores of val and test are those of the Eigen crop."""
        if split not in self.splits:
            raise UserError(f"nyuv2 has no split {split!r}; {nearest(split, self.splits)}")
        return self.splits[split]
