"""WFLW in miniature: its lists, the squares cut out, and which points the mirror exchanges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.benchmarks.wflw import LAYOUT, wflw
from distill.errors import UserError
from tests.distill.benchmarks import faces

Build = Callable[..., Any]
LIST = faces.LISTS.format("test")


def test_the_mirror_undoes_itself_and_leaves_the_middle_of_the_face(build: Build) -> None:
    mirrored = build("wflw").mirrored
    assert sorted(mirrored) == list(range(98))
    assert [mirrored[mirrored[index]] for index in range(98)] == list(range(98))
    middle = [index for index in range(98) if mirrored[index] == index]
    assert middle == [16, *range(51, 55), 57, 79, 85, 90, 94]
    assert (mirrored[0], mirrored[60], mirrored[96]) == (32, 72, 97)


def test_a_mirrored_face_maps_on_itself(build: Build) -> None:
    points = faces.face()
    flipped = np.stack([1 - points[:, 0], points[:, 1]], axis=1)[list(build("wflw").mirrored)]
    np.testing.assert_allclose(flipped, points, atol=1e-12)


def test_points_are_named_by_their_part(build: Build) -> None:
    names = build("wflw").class_names
    assert (names[0], names[33], names[60]) == ("contour 0", "left brow 33", "left eye 60")
    assert (names[72], names[95], names[97]) == ("right eye 72", "mouth 95", "right pupil 97")


def one_face(root: Path, box: str, size: tuple[int, int] = (40, 30)) -> Any:
    """The only face of test: a white pixel at (20, 10) in a black image, and all points on it."""
    faces.wflw(root)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[10, 20] = 255
    Image.fromarray(pixels).save(root / "WFLW_images/test--Event/0.png")
    points = "20.5 10.5 " * 98
    (root / LIST).write_text(f"{points}{box} 0 0 0 0 0 0 test--Event/0.png\n\n")
    return wflw(str(root)).dataset("test")


@pytest.mark.parametrize(
    ("box", "side"), [("15 5 27 13", 15), ("2 4 28 24", 33), ("16.2 3 24 11", 10)]
)
def test_the_square_around_the_rectangle_is_a_quarter_larger(
    box: str, side: int, tmp_path: Path
) -> None:
    image, points = one_face(tmp_path, box)[0]
    assert image.shape == (3, side, side)
    y, x = divmod(int(image[0].argmax()), side)
    torch.testing.assert_close(points * side, torch.tensor([x + 0.5, y + 0.5]).expand(98, 2))


def test_what_lies_beyond_the_image_is_mirrored(tmp_path: Path) -> None:
    image, points = one_face(tmp_path, "12 2 28 18", size=(24, 30))[0]  # 20 px from (10, 0)
    assert image.shape == (3, 20, 20)
    torch.testing.assert_close(points[0] * 20, torch.tensor([10.5, 10.5]))
    assert image[0].nonzero().tolist() == [[10, 10], [10, 17]]  # 20, and 27 as 2 * 24 - 1 - 20


def test_val_is_a_tenth_of_train_by_the_seed(build: Build, tmp_path: Path) -> None:
    faces.wflw(tmp_path, train=20)
    held = [set(wflw(str(tmp_path), split_seed=seed).dataset("val").names) for seed in (0, 0, 1)]
    assert len(held[0]) == 2
    assert held[0] == held[1] != held[2]


def test_the_faces_of_an_image_are_in_one_split(tmp_path: Path) -> None:
    faces.wflw(tmp_path, train=8)
    path = tmp_path / faces.LISTS.format("train")
    path.write_bytes(b"\xef\xbb\xbf" + 2 * path.read_bytes())
    for seed in range(4):
        benchmark = wflw(str(tmp_path), val_ratio=0.25, split_seed=seed)
        names = [benchmark.dataset(split).names for split in ("train", "val")]  # type: ignore[attr-defined]
        assert [len(split) for split in names] == [12, 4]
        train, val = ({name.partition(":")[0] for name in split} for split in names)
        assert not train & val


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    faces.wflw(tmp_path)
    good = (tmp_path / LIST).read_text()

    def refused(text: str, **options: Any) -> str:
        (tmp_path / LIST).write_text(text)
        with pytest.raises(UserError) as caught:
            wflw(str(tmp_path), **options).dataset("test")[0]
        return str(caught.value)

    assert f"{LIST}, line 1: expected 207 columns, got 206" in refused(good.partition(" ")[2])
    assert "could not convert string" in refused("x" + good)
    assert f"{LIST} lists no faces" in refused("\n")
    assert "not finite" in refused("nan " + good.partition(" ")[2])
    assert "data.options.val_ratio" in refused(good, val_ratio=1.5)
    far = " ".join(["5"] * 196 + ["900", "900", "950", "950"] + ["0"] * 6 + ["test--Event/0.png"])
    assert "the rectangle of test--Event/0.png:1 is outside" in refused(far)
    assert "data.options.margin: must be at least 0, got -1" in refused(good, margin=-1)
    assert LAYOUT.source in refused("x" + good)
