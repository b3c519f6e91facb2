"""ADE20K counts from 1, and its 0 is not scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.benchmarks.ade20k import NAMES


def test_numbers_are_less_one_and_zero_is_ignored(build: Callable[..., Any]) -> None:
    for split in ("train", "val"):
        assert build("ade20k").dataset(split)[0][1][:, 0].tolist() == [255, 0, 1, 149]


def test_names_stand_where_the_release_has_them() -> None:
    """Numbers of objectInfo150.txt, which counts from 1."""
    assert len(NAMES) == 150
    for number, name in ((1, "wall"), (13, "person"), (21, "car"), (50, "fireplace")):
        assert NAMES[number - 1] == name
    for number, name in ((100, "buffet"), (126, "pot"), (128, "bicycle"), (150, "flag")):
        assert NAMES[number - 1] == name
