"""`oxford_pets`: pets and background (Parkhi et al. 2012), 3,680 / 3,669 images."""

from __future__ import annotations

from functools import partial

import numpy as np

from distill.benchmarks import IGNORE_INDEX, hold_out_share
from distill.benchmarks.files import image_files, read_pairs
from distill.benchmarks.masks import MaskedImages, read_mask
from distill.benchmarks.published import Layout, Published

LAYOUT = Layout(
    name="oxford_pets",
    tree=(
        "oxford-iiit-pet/{images/*.jpg, annotations/trimaps/*.png, annotations/{trainval,test}.txt}"
    ),
    source="the data set's page at www.robots.ox.ac.uk/~vgg/data/pets",
    folder="oxford-iiit-pet",
)
TRAINVAL, TEST = 3_680, 3_669
# A trimap says foreground, background, not classified.
CLASSES = {1: 1, 2: 0, 3: IGNORE_INDEX}


def oxford_pets(root: str | None, *, val_ratio: float = 0.1, split_seed: int = 0) -> Published:
    """The trimaps of Oxford-IIIT Pet, laid out as torchvision's `OxfordIIITPet` has them.

    Args:
        root: Folder of `oxford-iiit-pet/`, or that folder.
        val_ratio: Share of the list `trainval` that is held out for val.
        split_seed: Chooses it.
    """
    with LAYOUT.at(root) as base:
        images, labels = image_files(base / "images"), base / "annotations"
        masks = image_files(labels / "trimaps")
        pairs = read_pairs(labels / "trainval.txt", images, masks)
        test = read_pairs(labels / "test.txt", images, masks)
    read = partial(read_mask, classes=CLASSES)
    train, val = hold_out_share(pairs, val_ratio, split_seed, "data.options.val_ratio")
    held = round(val_ratio * TRAINVAL)
    return LAYOUT.benchmark(
        {
            "train": MaskedImages(train, read),
            "val": MaskedImages(val, read),
            "test": MaskedImages(test, read),
        },
        task="segmentation",
        class_names=("background", "pet"),
        palette=np.array([[40, 40, 48], [230, 97, 1]], dtype=np.uint8),
        sizes={"train": TRAINVAL - held, "val": held, "test": TEST},
    )
