"""`cityscapes`: street scenes in 19 classes (Cordts et al. 2016), 2,975 / 500 images."""

from __future__ import annotations

from functools import partial

import numpy as np
from torchvision import datasets

from distill.benchmarks import IGNORE_INDEX
from distill.benchmarks.files import pair_all, tagged_files
from distill.benchmarks.masks import MaskedImages, read_mask
from distill.benchmarks.published import Layout, Published

LAYOUT = Layout(
    name="cityscapes",
    tree=(
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
        "gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
    ),
    source="the data set's page at www.cityscapes-dataset.com (with registration)",
    sizes={"train": 2_975, "val": 500},
)
# torchvision has the official table of label ids, train ids and colours.
TRAINED = sorted(
    (label for label in datasets.Cityscapes.classes if label.train_id not in (-1, IGNORE_INDEX)),
    key=lambda label: label.train_id,
)
# Licence plates, id -1, do not occur in the masks. A train id of 255 is not scored.
CLASSES = {label.id: label.train_id for label in datasets.Cityscapes.classes if label.id >= 0}


def cityscapes(root: str | None) -> Published:
    """The finely annotated images, their label ids turned into the 19 train ids.

    Args:
        root: Folder of `leftImg8bit/` and `gtFine/`.
    """
    with LAYOUT.at(root) as base:
        splits = {
            split: MaskedImages(
                pair_all(
                    tagged_files(base / "leftImg8bit" / split, "_leftImg8bit.png"),
                    tagged_files(base / "gtFine" / split, "_gtFine_labelIds.png"),
                ),
                partial(read_mask, classes=CLASSES),
            )
            for split in LAYOUT.sizes
        }
    return LAYOUT.benchmark(
        splits,
        task="segmentation",
        class_names=tuple(label.name for label in TRAINED),
        palette=np.array([label.color for label in TRAINED], dtype=np.uint8),
        withheld=("test",),
    )
