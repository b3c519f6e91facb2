"""ImageNet: a thousand classes, whichever folders are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_class_keeps_its_number_where_others_are_missing(build: Callable[..., Any]) -> None:
    benchmark = build("imagenet")
    assert benchmark.num_classes == 1_000
    assert benchmark.dataset("val").targets == [0, 999]
    assert benchmark.class_names[0] == "tench"
    assert benchmark.class_names[281] == "tabby"
    assert benchmark.class_names[134] == "crane (n02012849)"
    assert benchmark.class_names[517] == "crane (n03126707)"


def test_the_target_without_label_is_no_class(build: Callable[..., Any]) -> None:
    assert build("imagenet").ignore_index == -1  # 255 is one


def test_a_folder_that_is_no_class_is_named(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("imagenet")
    (tmp_path / "val" / "n00000000").mkdir()
    assert f"{tmp_path / 'val/n00000000'} is not one of the 1000 classes" in refusal("imagenet")
