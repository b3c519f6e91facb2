"""Files found by name, and masks of numbers and of colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.benchmarks.files import (
    image_files,
    pair_all,
    read_colour_mask,
    read_mask,
    read_pairs,
    tagged_files,
)
from distill.errors import UserError


def test_hidden_files_are_no_images(rows: Callable[..., None], tmp_path: Path) -> None:
    rows(tmp_path / "a.png", [0])
    (tmp_path / "._a.png").write_bytes(b"what some archives hold beside it")
    assert list(image_files(tmp_path)) == ["a"]


def test_tagged_files_are_found_at_any_depth_by_the_name_before_the_tag(
    rows: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("b/x_L.png", "a/y_L.png", "a/y.png"):
        rows(tmp_path / name, [0])
    assert tagged_files(tmp_path, "_L.png") == {
        "y": tmp_path / "a/y_L.png",
        "x": tmp_path / "b/x_L.png",
    }
    with pytest.raises(UserError, match=r"there is no .*_M\.png"):
        tagged_files(tmp_path, "_M.png")


def test_images_without_a_mask_are_counted() -> None:
    images = {name: Path(f"{name}.jpg") for name in "abc"}
    with pytest.raises(UserError, match=r"^b\.jpg has no mask .* \(2 of 3 images have none\)$"):
        pair_all(images, {"a": Path("a.png")})


def test_listed_names_without_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\n")
    images = {name: Path(f"{name}.jpg") for name in "abd"}
    masks = {name: Path(f"{name}.png") for name in "ac"}
    with pytest.raises(
        UserError, match=r"line 2: b\.jpg has no mask file b\.\* \(3 of 4 listed images are inc"
    ):
        read_pairs(tmp_path / "list.txt", images, masks)


@pytest.mark.parametrize("value", [-1, 3, 70_000])
def test_a_number_beyond_the_known_ones_is_named(value: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(np.array([[0, 1], [2, value]], dtype=np.int32)).save(path)
    with pytest.raises(UserError, match=f"value {value} is not a class; allowed: 0 to 2$"):
        read_mask(path, (2, 2), {0: 0, 1: 1, 2: 2})


def test_colours_are_told_apart_by_all_three_channels(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (255, 255, 255)]
    Image.fromarray(np.array([colours], dtype=np.uint8)).save(path)
    classes = {colour: number for number, colour in enumerate(colours)}
    assert read_colour_mask(path, (1, 4), classes).tolist() == [[0, 1, 2, 3]]


def test_a_deep_file_is_no_colour_mask(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(path)
    with pytest.raises(UserError, match="a colour mask is an 8-bit file; this file's is 'I;16'"):
        read_colour_mask(path, (2, 2), {(0, 0, 0): 0})
