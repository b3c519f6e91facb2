"""Pascal VOC 2012: palette files, the border 255, and the augmented list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torchvision.models.segmentation import FCN_ResNet50_Weights

from distill.benchmarks import colour_map, distinct_colours
from distill.benchmarks.voc2012 import NAMES


def test_indices_are_classes_and_the_border_is_ignored(build: Callable[..., Any]) -> None:
    train = build("voc2012").dataset("train")
    assert train.names == ["a"]
    assert train[0][1][:, 0].tolist() == [0, 1, 20, 255]


def test_the_augmented_list_has_masks_of_its_own_and_val_stays(
    build: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = build("voc2012", augmented=True)
    assert "train has 1 of 10582 images, val has 1 of 1449" in capsys.readouterr().err
    assert benchmark.dataset("train").names == ["b"]
    assert benchmark.dataset("train")[0][1][:, 0].tolist() == [0, 1, 20, 255]
    assert benchmark.dataset("val").names == ["c"]


def test_names_are_torchvisions() -> None:
    assert NAMES[1:] == tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])


def test_colours_are_the_development_kits() -> None:
    colours = colour_map(256)
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15].tolist() == [192, 128, 128]  # person
    assert colours[20].tolist() == [0, 64, 128]  # tvmonitor
    assert colours[255].tolist() == [224, 224, 192]  # the border's


@pytest.mark.parametrize("count", [2, 48, 49, 150, 171])
def test_no_two_classes_have_colours_that_look_alike(count: int) -> None:
    colours = distinct_colours(count).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert apart[~np.eye(count, dtype=bool)].min() > 16
