"""CelebAMask-HQ: masks painted from part files, and the split of CelebA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FACES = "CelebAMask-HQ"
ANNOTATIONS = f"{FACES}/CelebAMask-HQ-mask-anno"


def test_a_later_part_covers_an_earlier_one_and_the_rest_is_background(
    build: Callable[..., Any],
) -> None:
    benchmark = build("celebamask_hq")
    image, mask = benchmark.dataset("train")[0]
    assert image.shape == (3, 4, 8)  # 16 px high, resized to its parts
    skin, hair = benchmark.class_names.index("skin"), benchmark.class_names.index("hair")
    assert (skin, hair, benchmark.num_classes) == (1, 13, 19)
    assert mask[:, 0].tolist() == [skin, hair, 0, 0]
    left, right = map(benchmark.class_names.index, ("l_ear", "r_ear"))
    assert benchmark.mirrored[left] == right


def test_eighteen_classes_are_the_parts_alone(build: Callable[..., Any]) -> None:
    benchmark = build("celebamask_hq", classes=18)
    assert benchmark.class_names[0] == "skin"
    assert benchmark.dataset("train")[0][1][:, 0].tolist() == [0, 12, 255, 255]


def test_another_number_of_classes_is_refused(refusal: Callable[..., str]) -> None:
    assert "data.options.classes: must be 18" in refusal("celebamask_hq", classes=17)


def test_the_split_is_that_of_the_number_in_celeba(build: Callable[..., Any]) -> None:
    benchmark = build("celebamask_hq")
    names = {split: benchmark.dataset(split).names for split in ("train", "val", "test")}
    assert names == {"train": ["0"], "val": ["1", "2"], "test": ["2000"]}


def test_without_the_mapping_the_numbers_themselves_split_and_it_is_said(
    build: Callable[..., Any],
    rows: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build("celebamask_hq")
    (tmp_path / FACES / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    for number in (24_182, 24_183, 27_175, 27_176):
        rows(tmp_path / FACES / f"CelebA-HQ-img/{number}.jpg", [[0, 0, 0]] * 4)
        rows(tmp_path / ANNOTATIONS / f"{number // 2_000}/{number}_nose.png", [255] * 4)
    capsys.readouterr()
    benchmark = build("celebamask_hq")
    assert "split by number, not as published" in capsys.readouterr().err
    assert benchmark.dataset("train").names == ["0", "1", "2", "2000", "24182"]
    assert benchmark.dataset("val").names == ["24183", "27175"]
    assert benchmark.dataset("test").names == ["27176"]


def test_a_face_without_parts_is_named(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("celebamask_hq")
    for file in (tmp_path / ANNOTATIONS / "0").glob("00000_*"):
        file.unlink()
    assert "0.jpg: there is no part file" in refusal("celebamask_hq")


def test_a_part_of_another_size_is_named(
    build: Callable[..., Any],
    refusal: Callable[..., str],
    rows: Callable[..., None],
    tmp_path: Path,
) -> None:
    build("celebamask_hq")
    rows(tmp_path / ANNOTATIONS / "0/00000_hair.png", [255] * 5)
    assert "00000_hair.png: must be 8x4 px" in refusal("celebamask_hq")


def test_a_broken_line_of_the_mapping_is_named(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("celebamask_hq")
    (tmp_path / FACES / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx\n0 x.jpg\n")
    assert "mapping.txt, line 2: expected 'idx orig_idx orig_file'" in refusal("celebamask_hq")


def test_the_mapping_may_begin_with_a_byte_order_mark(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    build("celebamask_hq")
    path = tmp_path / FACES / "CelebA-HQ-to-CelebA-mapping.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert build("celebamask_hq").dataset("train").names == ["0"]
