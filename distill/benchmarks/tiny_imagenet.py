"""`tiny_imagenet`: 64 px images of 200 classes (Stanford's CS231n), 100,000 / 10,000 images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.benchmarks.files import LabelledImages, files_below, read_lines
from distill.benchmarks.image_folder import sorted_images, unique_names
from distill.benchmarks.published import Layout, Published
from distill.errors import UserError

LAYOUT = Layout(
    name="tiny_imagenet",
    tree=(
        "tiny-imagenet-200/{wnids.txt, words.txt, train/WNID/images/*.JPEG, val/images/*.JPEG, "
        "val/val_annotations.txt}"
    ),
    source="cs231n.stanford.edu (tiny-imagenet-200.zip)",
    folder="tiny-imagenet-200",
    sizes={"train": 100_000, "val": 10_000},
)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    return [line.strip() for line in read_lines(file) if line.strip()]


def _val(base: Path, numbers: Mapping[str, int]) -> LabelledImages:
    """The images of val, whose classes stand in a list: file, WordNet id, box."""
    annotations, samples = base / "val" / "val_annotations.txt", []
    present = {path.name for path in files_below(base / "val" / "images")}
    for number, line in enumerate(_lines(annotations), start=1):
        name, wnid = (*map(str.strip, line.split("\t")), "")[:2]
        if wnid not in numbers:
            raise UserError(f"{annotations}, line {number}: {wnid!r} is not one of the classes")
        if name not in present:
            raise UserError(f"{annotations}, line {number}: there is no file val/images/{name}")
        samples.append((str(base / "val" / "images" / name), numbers[wnid]))
    return LabelledImages(base, samples)


def tiny_imagenet(root: str | None) -> Published:
    """Tiny-ImageNet as it is unpacked; classes in the order of their WordNet ids.

    Args:
        root: Folder of `tiny-imagenet-200/`, or that folder.
    """
    with LAYOUT.at(root) as base:
        wnids = sorted(_lines(base / "wnids.txt"))
        numbers = {wnid: number for number, wnid in enumerate(wnids)}
        lines = (line.partition("\t") for line in _lines(base / "words.txt"))
        words = {wnid.strip(): text.strip() for wnid, _, text in lines}
        splits = {"train": sorted_images(base, "train", numbers), "val": _val(base, numbers)}
    return LAYOUT.benchmark(
        splits,
        task="classification",
        class_names=unique_names({wnid: words.get(wnid, wnid) for wnid in wnids}),
        withheld=("test",),
    )
