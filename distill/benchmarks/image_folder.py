"""`image_folder`: classification of any images in one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from distill.benchmarks import notice
from distill.benchmarks.files import LabelledImages, images_below
from distill.benchmarks.published import Layout, Published
from distill.errors import UserError

LAYOUT = Layout(
    name="image_folder",
    tree="{train,val}/CLASS/**/*.jpg, and test/ where there is one",
    source="wherever your images are, sorted into folders",
)


def class_folders(split: Path) -> list[str]:
    """Sorted names of a split's class folders. Raises UserError if the split has no folder."""
    if not split.is_dir():
        raise UserError(f"there is no folder {split}")
    return sorted(
        entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def sorted_images(base: Path, split: str, numbers: Mapping[str, int]) -> LabelledImages:
    """The images below the class folders of a split, what links lead to once a class.

    Args:
        base: Folder of the splits.
        split: Name of the split's folder.
        numbers: From a class folder to its class; folders of classes without images may be missing.

    Raises:
        UserError: There is no such folder, no image, or a folder that is not a class.
    """
    strangers = [name for name in class_folders(base / split) if name not in numbers]
    if strangers:
        raise UserError(f"{base / split / strangers[0]} is not one of the {len(numbers)} classes")
    samples = [
        (str(path), numbers[name])
        for name in class_folders(base / split)
        for path in sorted(images_below(base / split / name), key=os.path.split)
    ]
    if not samples:
        raise UserError(f"there is no image in a class folder of {base / split}")
    full = {target for _, target in samples}
    bare = [name for name in class_folders(base / split) if numbers[name] not in full]
    if bare:
        notice(f"{base / split / bare[0]} contains no images ({len(bare)} class folders are empty)")
    return LabelledImages(base, samples)


def unique_names(descriptions: Mapping[str, str]) -> tuple[str, ...]:
    """A name for each WordNet id: the first of its words, with the id where two begin alike."""
    first = {wnid: words.split(",")[0].strip() for wnid, words in descriptions.items()}
    uses = Counter(first.values())
    return tuple(f"{name} ({wnid})" if uses[name] > 1 else name for wnid, name in first.items())


def image_folder(root: str | None) -> Published:
    """Splits laid out for torchvision's `ImageFolder`; classes are the folders of train, sorted.

    Args:
        root: Folder of `train/`, `val/` and perhaps `test/`.
    """
    with LAYOUT.at(root) as base:
        class_names = class_folders(base / "train")
        if len(class_names) < 2:
            raise UserError(
                f"{base / 'train'} has {len(class_names)} class folders; it needs at least 2"
            )
        numbers = {name: number for number, name in enumerate(class_names)}
        splits = {
            split: sorted_images(base, split, numbers)
            for split in ("train", "val", "test")
            if split != "test" or (base / split).is_dir()
        }
    return LAYOUT.benchmark(splits, task="classification", class_names=tuple(class_names))
