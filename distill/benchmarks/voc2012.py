"""`voc2012`: 20 classes and background (Everingham et al. 2015), 1,464 / 1,449 images."""

from __future__ import annotations

from functools import partial

from distill.benchmarks import IGNORE_INDEX, colour_map
from distill.benchmarks.files import image_files, read_pairs
from distill.benchmarks.masks import MaskedImages, read_mask
from distill.benchmarks.published import Layout, Published, comma_separated

NAMES = comma_separated("""
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
    horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
""")
LAYOUT = Layout(
    name="voc2012",
    tree=(
        "VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClass/*.png, "
        "ImageSets/Segmentation/{train,val}.txt}, with data.options.augmented=true also "
        "SegmentationClassAug/*.png and ImageSets/Segmentation/trainaug.txt"
    ),
    source=(
        "the challenge's page at host.robots.ox.ac.uk/pascal/VOC/voc2012 (the augmented masks are "
        "those of the Semantic Boundaries Dataset, as PNG files)"
    ),
    folder="VOCdevkit/VOC2012",
    sizes={"train": 1_464, "val": 1_449},
)
AUGMENTED = 10_582
# 255 is the border of the objects.
CLASSES = {number: number for number in range(len(NAMES))} | {IGNORE_INDEX: IGNORE_INDEX}


def voc2012(root: str | None, *, augmented: bool = False) -> Published:
    """The segmentation task; masks are files with a palette.

    Args:
        root: Folder of `VOCdevkit/`, or `VOCdevkit/VOC2012` itself.
        augmented: Train on the 10,582 images of the list `trainaug` (Hariharan et al. 2011); val
            stays the same.
    """
    with LAYOUT.at(root) as base:
        lists, images = base / "ImageSets" / "Segmentation", image_files(base / "JPEGImages")
        masks = image_files(base / "SegmentationClass")
        read = partial(read_mask, classes=CLASSES)
        if augmented:
            wide = image_files(base / "SegmentationClassAug")
            train = read_pairs(lists / "trainaug.txt", images, wide)
        else:
            train = read_pairs(lists / "train.txt", images, masks)
        splits = {
            "train": MaskedImages(train, read),
            "val": MaskedImages(read_pairs(lists / "val.txt", images, masks), read),
        }
    return LAYOUT.benchmark(
        splits,
        task="segmentation",
        class_names=NAMES,
        palette=colour_map(len(NAMES)),
        sizes={**LAYOUT.sizes, "train": AUGMENTED} if augmented else None,
        withheld=("test",),
    )
