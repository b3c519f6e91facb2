"""Tiny-ImageNet: train in folders, val in a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = "tiny-imagenet-200"


def test_classes_are_in_the_order_of_wordnet_ids_with_readable_names(
    build: Callable[..., Any],
) -> None:
    benchmark = build("tiny_imagenet")
    assert benchmark.class_names == ("goldfish", "crane (n02012849)", "crane (n03126707)")
    assert benchmark.dataset("train").targets == [0, 1, 2]
    assert benchmark.dataset("train").names[0] == "train/n01443537/images/n01443537_0.JPEG"


def test_the_classes_of_val_stand_in_its_list(build: Callable[..., Any]) -> None:
    val = build("tiny_imagenet").dataset("val")
    assert val.names == ["val/images/val_0.JPEG", "val/images/val_1.JPEG"]
    assert [
        (round(float(image.float().mean()), -1), target) for image, target in (val[0], val[1])
    ] == [
        (40, 2),
        (90, 0),
    ]


def test_a_line_of_an_unknown_class_is_named(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("tiny_imagenet")
    (tmp_path / BASE / "val/val_annotations.txt").write_text("val_0.JPEG\tn09999999\t0\n")
    assert "val_annotations.txt, line 1: 'n09999999' is not one" in refusal("tiny_imagenet")


def test_marks_and_blanks_around_ids_are_left_out(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    expected = build("tiny_imagenet")
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        path = tmp_path / BASE / name
        lines = path.read_text().replace("\t", " \t ").splitlines()
        path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}  \r\n" for line in lines).encode())
    benchmark = build("tiny_imagenet")
    assert benchmark.class_names == expected.class_names
    assert benchmark.dataset("val").targets == expected.dataset("val").targets
