"""`camvid`: street scenes in 11 classes (Brostow et al. 2008), 367 / 101 / 233 images (SegNet)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.benchmarks import IGNORE_INDEX, Task
from distill.benchmarks.files import MaskedImages, image_files, read_pairs
from distill.errors import UserError, nearest

SPLITS = ("train", "val", "test")
VOID = 11
COLOURS = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class CamVid:
    """CamVid as the SegNet release lays it out; mask value 11 (void) is ignored.

    Args:
        root: Folder of train/, trainannot/, train.txt and the same of val and test. Images and
            masks are paired by stem and may be .png or .jpg.
    """

    name = "camvid"
    task: Task = "segmentation"
    class_names = tuple(COLOURS)
    num_classes = len(COLOURS)
    ignore_index = IGNORE_INDEX
    palette = np.array(list(COLOURS.values()), dtype=np.uint8)

    def __init__(self, root: str | None) -> None:
        expected = (
            "CamVid in SegNet's layout is {train,val,test}/*.png, {train,val,test}annot/*.png and "
            "{train,val,test}.txt; say where with data.root=FOLDER"
        )
        if root is None:
            raise UserError(f"camvid: no folder given; {expected}")
        classes = {value: value for value in range(self.num_classes)} | {VOID: IGNORE_INDEX}
        self._splits = {}
        for split in SPLITS:
            try:
                images = image_files(Path(root, split))
                masks = image_files(Path(root, f"{split}annot"))
                pairs = read_pairs(Path(root, f"{split}.txt"), images, masks)
            except UserError as error:
                raise UserError(f"camvid: {error}; {expected}") from error
            self._splits[split] = MaskedImages(pairs, classes)

    def dataset(self, split: str) -> MaskedImages:
        """The pairs of `train`, `val` or `test`."""
        if split not in self._splits:
            raise UserError(f"camvid has no split {split!r}; {nearest(split, SPLITS)}")
        return self._splits[split]
