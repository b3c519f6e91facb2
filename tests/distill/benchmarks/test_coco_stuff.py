"""COCO-Stuff: 182 ids with gaps become 171 classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from distill.benchmarks.coco_stuff import CLASSES, NEVER_LABELLED, STUFF, THINGS


def test_ids_less_one_become_classes_without_gaps(build: Callable[..., Any]) -> None:
    # person, traffic light, fire hydrant, stop sign, toothbrush, banner, wood, no label
    assert build("coco_stuff").dataset("val")[0][1][:, 0].tolist() == [
        *(0, 9, 10, 11, 79, 80, 170, 255)
    ]


def test_things_and_gaps_are_those_of_torchvision() -> None:
    categories = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    known = [name for name in categories[1:] if name != "N/A"]
    assert list(THINGS) == known
    gaps = {number for number, name in enumerate(categories) if name == "N/A"}
    assert NEVER_LABELLED - {91} == gaps  # torchvision's table ends at 90
    assert (len(THINGS), len(STUFF), len(set(CLASSES.values()))) == (80, 91, 172)


def test_an_id_that_was_never_labelled_is_refused(
    build: Callable[..., Any],
    refusal: Callable[..., str],
    rows: Callable[..., None],
    tmp_path: Path,
) -> None:
    build("coco_stuff")
    rows(tmp_path / "stuffthingmaps/train2017/000000000009.png", [0] * 7 + [11])  # street sign
    assert "mask value 11 is not a class; allowed: 0 to 10, 12 to 24," in refusal("coco_stuff")
