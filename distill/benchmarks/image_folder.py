"""`image_folder`: classification of any images in one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

from distill.benchmarks import hold_out_share, notice
from distill.benchmarks.files import LabelledImages, images_below
from distill.benchmarks.images import SKIP, UnlabelledImages
from distill.benchmarks.published import Layout, Published
from distill.errors import UserError

LAYOUT = Layout(
    name="image_folder",
    tree=(
        "train/CLASS/**/*.jpg, with val/ and test/ like it and unlabelled/**/*.jpg where you have "
        "them; or CLASS/**/*.jpg alone"
    ),
)
SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"


def class_folders(split: Path) -> list[str]:
    """Sorted names of a split's class folders. Raises UserError if the split has no folder."""
    if not split.is_dir():
        raise UserError(f"there is no folder {split}")
    return sorted(
        entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def sorted_images(
    base: Path, split: str, numbers: Mapping[str, int], beside: Container[str] = ()
) -> LabelledImages:
    """The images below the class folders of a split, what links lead to once a class.

    Args:
        base: Folder of the splits.
        split: Name of the split's folder.
        numbers: From a class folder to its class; folders of classes without images may be missing.
        beside: Other folders there, which are left out.

    Raises:
        UserError: There is no such folder, no image, or a folder that is not a class.
    """
    folders = [name for name in class_folders(base / split) if name not in beside]
    strangers = [name for name in folders if name not in numbers]
    if strangers:
        raise UserError(f"{base / split / strangers[0]} is not one of the {len(numbers)} classes")
    samples = [
        (str(path), numbers[name])
        for name in folders
        for path in sorted(images_below(base / split / name), key=os.path.split)
    ]
    if not samples:
        raise UserError(f"there is no image in a class folder of {base / split}")
    full = {target for _, target in samples}
    bare = [name for name in folders if numbers[name] not in full]
    if bare:
        notice(f"{base / split / bare[0]} contains no images ({len(bare)} class folders are empty)")
    return LabelledImages(base, samples)


def unique_names(descriptions: Mapping[str, str]) -> tuple[str, ...]:
    """A name for each WordNet id: the first of its words, with the id where two begin alike."""
    first = {wnid: words.split(",")[0].strip() for wnid, words in descriptions.items()}
    uses = Counter(first.values())
    return tuple(f"{name} ({wnid})" if uses[name] > 1 else name for wnid, name in first.items())


def image_folder(
    root: str | None,
    *,
    unlabelled: str = UNLABELLED,
    skip: float = SKIP,
    val_ratio: float = 0.1,
    test_ratio: float = 0.2,
    split_seed: int = 0,
) -> Published:
    """Splits laid out for torchvision's `ImageFolder`; classes are the folders of train, sorted.

    Without `val/`, some images of train are held out for it; without `train/`, the class folders
    lie in the root, and test and val are drawn from all images.

    Args:
        root: Folder of `train/`, or of the class folders.
        unlabelled: Folder in `root` of more images for training, of any class or none.
        skip: Largest share of those that may be unreadable; each is named.
        val_ratio: Share of the train images that is held out for val where there is no `val/`.
        test_ratio: Share of all images that is held out for test where there is no `train/`.
        split_seed: Chooses the held-out images.
    """
    with LAYOUT.at(root) as base:
        bare = _unlabelled(base, unlabelled, skip)
        given = [name for name in SPLITS if (base / name).is_dir()]
        train, beside = (base / "train", "") if given else (base, unlabelled)
        class_names = [name for name in class_folders(train) if name != beside]
        if len(class_names) < 2:
            raise UserError(f"{train} has {len(class_names)} class folders; it needs at least 2")
        if UNLABELLED in class_names:
            notice(
                f"image_folder: {train / UNLABELLED} is a class; put images without a class into "
                f"{base / UNLABELLED}"
            )
        numbers = {name: number for number, name in enumerate(class_names)}
        samples = {split: sorted_images(base, split, numbers).samples for split in given}
        if not given:
            samples["train"], samples["test"] = hold_out_share(
                sorted_images(base, "", numbers, {beside}).samples,
                *(test_ratio, split_seed, "data.options.test_ratio"),
            )
        if "val" not in samples:
            samples["train"], samples["val"] = hold_out_share(
                samples["train"], val_ratio, split_seed, "data.options.val_ratio"
            )
            counts = ", ".join(f"{len(some)} {split}" for split, some in samples.items())
            notice(f"image_folder: data.options.split_seed={split_seed} made {counts} images")
        splits = {split: LabelledImages(base, some) for split, some in samples.items()}
    return LAYOUT.benchmark(
        splits, task="classification", class_names=tuple(class_names), bare=bare
    )


def _unlabelled(base: Path, folder: str, skip: float) -> UnlabelledImages | None:
    """The images below a folder for those without a class; None where there is none."""
    if not (base / folder).is_dir():
        if folder != UNLABELLED:
            raise UserError(f"data.options.unlabelled: there is no folder {base / folder}")
        return None
    paths = images_below(base / folder)
    if not paths:
        raise UserError(f"there is no image in {base / folder}")
    return UnlabelledImages(base, paths, skip)
