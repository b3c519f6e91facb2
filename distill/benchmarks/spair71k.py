"""`spair71k`: pairs of images with semantic keypoints, 18 categories (Min et al. 2019)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.benchmarks.files import read_image, tagged_files
from distill.benchmarks.geometric import KeypointPair
from distill.benchmarks.published import Layout
from distill.errors import UserError, nearest, one_line

LAYOUT = Layout(
    name="spair71k",
    tree="PairAnnotation/{trn,val,test}/*.json and JPEGImages/CATEGORY/*.jpg",
    source="the data set's page at cvlab.postech.ac.kr/research/SPair-71k",
    folder="SPair-71k",
    sizes={"train": 53_340, "val": 5_384, "test": 12_234},
)
FOLDERS = {"train": "trn", "val": "val", "test": "test"}


class AnnotatedPairs:
    """Pairs of one split, in the order of their files' names, read when asked for.

    Args:
        files: Their annotations, JSON.
        images: Folder with one folder per category.
    """

    def __init__(self, files: list[Path], images: Path) -> None:
        self.files, self.images = files, images
        self.names = [file.stem for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> KeypointPair:
        file = self.files[index]
        try:
            entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            category = str(entry["category"])
            names = f"{category}/{entry['src_imname']}", f"{category}/{entry['trg_imname']}"
            # Its keypoints are indices of pixels, ours positions: the centre of pixel 0 is at 0.5.
            points = [_numbers(entry[key], 2) + 0.5 for key in ("src_kps", "trg_kps")]
            box = _numbers([entry["trg_bndbox"]], 4)[0]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{file} is not a pair annotation: {reason}") from error
        if len(points[0]) != len(points[1]) or not len(points[0]):
            raise UserError(
                f"{file}: needs as many source as target points, at least one, got "
                f"{len(points[0])} and {len(points[1])}"
            )
        return KeypointPair(
            names=names,
            source=read_image(self.images / names[0]),
            target=read_image(self.images / names[1]),
            source_points=points[0],
            target_points=points[1],
            box=box,
            category=category,
        )


def _numbers(rows: Any, width: int) -> Tensor:
    """(N, width) float32; ValueError or TypeError if it is something else."""
    numbers = torch.tensor(rows, dtype=torch.float32)
    if numbers.ndim != 2 or numbers.shape[1] != width:
        raise ValueError(f"expected rows of {width} numbers, got {rows}"[:200])
    return numbers


class SPair71k:
    """The pairs of each split, with all their keypoints.

    Args:
        root: Folder of `SPair-71k/`, or itself.
    """

    name = "spair71k"

    def __init__(self, root: str | None) -> None:
        with LAYOUT.at(root) as base:
            self.base = base
            for folder in ("PairAnnotation", "JPEGImages"):
                if not (base / folder).is_dir():
                    raise UserError(f"there is no folder {base / folder}")

    def pairs(self, split: str) -> AnnotatedPairs:
        """The pairs of a split; one line on stderr where there are more or fewer than published."""
        if split not in FOLDERS:
            raise UserError(f"spair71k has no split {split!r}; {nearest(split, FOLDERS)}")
        with LAYOUT.at(str(self.base)):
            folder = self.base / "PairAnnotation" / FOLDERS[split]
            files = list(tagged_files(folder, ".json").values())
        LAYOUT.compare_sizes({split: len(files)}, {split: LAYOUT.sizes[split]}, "pairs")
        return AnnotatedPairs(files, self.base / "JPEGImages")
