"""Files found by name, and masks of numbers and of colours."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.benchmarks.files import files_below, image_files, pair_all, read_pairs, tagged_files
from distill.benchmarks.masks import read_colour_mask, read_mask
from distill.errors import UserError
from tests.distill.benchmarks.test_images import png


def test_hidden_files_are_no_images(rows: Callable[..., None], tmp_path: Path) -> None:
    rows(tmp_path / "a.png", [0])
    (tmp_path / "._a.png").write_bytes(b"what some archives hold beside it")
    (tmp_path / "folder.png").mkdir()
    assert list(image_files(tmp_path)) == ["a"]


def test_tagged_files_are_found_at_any_depth_by_the_name_before_the_tag(
    rows: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("b/x_L.png", "a/y_L.png", "a/y.png", "a/._y_L.png"):
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
    with pytest.raises(UserError, match="a colour mask must be 8-bit; this file's mode is 'I;16'"):
        read_colour_mask(path, (2, 2), {(0, 0, 0): 0})


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_numbers(bits: int, tmp_path: Path) -> None:
    path, last = tmp_path / "mask.png", 2**bits - 1
    png(path, (8 // bits, 1), (bits, 0), bytes([0b11100100 if bits == 2 else last]))
    row = {1: [0] * 7 + [1], 2: [3, 2, 1, 0], 4: [0, 15], 8: [255]}[bits]
    classes = {value: value for value in range(256)}
    assert read_mask(path, (1, 8 // bits), classes).tolist() == [row]


@pytest.mark.parametrize(("head", "data"), [("P5", b"\0\1"), ("P2", b"0 1\n")])
def test_a_mask_whose_numbers_are_scaled_is_refused(head: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mask.pgm"
    for largest in (1, 1000):
        path.write_bytes(f"{head}\n2 1\n{largest}\n".encode() + 2 * data)
        with pytest.raises(UserError, match=rf"mask\.pgm: .*its largest is {largest}\); save it"):
            read_mask(path, (1, 2), {0: 0, 1: 1})
    path.write_bytes(f"{head}\n2 1\n255\n".encode() + data)
    assert read_mask(path, (1, 2), {0: 0, 1: 1}).tolist() == [[0, 1]]


def test_names_with_accents_are_one_however_they_are_written(
    rows: Callable[..., None], tmp_path: Path
) -> None:
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert nfc != nfd
    for name in (f"images/{nfd}.png", f"masks/{nfc}.png", f"tagged/{nfd}_L.png"):
        rows(tmp_path / name, [0])
    images, masks = image_files(tmp_path / "images"), image_files(tmp_path / "masks")
    assert len(pair_all(images, masks)) == 1
    assert list(tagged_files(tmp_path / "tagged", "_L.png")) == [nfc]
    for name in (nfc, nfd):
        (tmp_path / "list.txt").write_text(f"{name}\n")
        assert len(read_pairs(tmp_path / "list.txt", images, masks)) == 1


def test_a_listed_name_is_taken_as_it_stands(tmp_path: Path) -> None:
    files = {name: Path(f"{name}.png") for name in ("v1", "5", "1", "a cell", "my cell", "my", "b")}
    lines = ["5 group/1", "my cell.png", "some/v1.PNG", "my images/b.jpg"]
    lines += ["new/a cell.png", "my.png masks/a.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "list.txt", files, files)
    assert [pair.image.stem for pair in pairs] == ["5", "my cell", "v1", "b", "a cell", "my"]
    (tmp_path / "list.txt").write_text("v1.5\n")
    with pytest.raises(UserError, match=r"line 1: no image file is named 'v1\.5'"):
        read_pairs(tmp_path / "list.txt", files, files)


def test_a_folder_that_may_not_be_read_is_named(
    rows: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(tmp_path / "a" / "x.png", [0])
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: Any) -> Any:  # to root every folder is open
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=f"^Permission denied: {tmp_path / 'closed'}$"):
        files_below(tmp_path)
