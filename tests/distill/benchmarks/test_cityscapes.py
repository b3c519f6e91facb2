"""Cityscapes: label ids become train ids, and cities are folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_label_ids_become_train_ids(build: Callable[..., Any]) -> None:
    # unlabelled, road, sidewalk, building, guard rail (not scored), train, bicycle
    assert build("cityscapes").dataset("val")[0][1][:, 0].tolist() == [255, 0, 1, 2, 255, 16, 18]


def test_the_cities_of_a_split_are_one_list(build: Callable[..., Any]) -> None:
    assert build("cityscapes").dataset("train").names == [
        "aachen_000000_000019_leftImg8bit",
        "bochum_000000_000019_leftImg8bit",
    ]


def test_names_and_colours_are_in_the_order_of_train_ids(build: Callable[..., Any]) -> None:
    benchmark = build("cityscapes")
    assert benchmark.num_classes == 19
    assert benchmark.class_names[:3] == ("road", "sidewalk", "building")
    assert benchmark.class_names[18] == "bicycle"
    assert benchmark.palette[[0, 10, 18]].tolist() == [
        [128, 64, 128],
        [70, 130, 180],
        [119, 11, 32],
    ]


def test_train_ids_in_the_place_of_label_ids_are_refused(
    build: Callable[..., Any],
    refusal: Callable[..., str],
    rows: Callable[..., None],
    tmp_path: Path,
) -> None:
    build("cityscapes")
    mask = tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    rows(mask, [0, 1, 2, 18, 255, 255, 255])
    assert f"{mask}: mask value 255 is not a class; allowed: 0 to 33" in refusal(
        "cityscapes", "val"
    )
