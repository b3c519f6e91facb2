"""Oxford-IIIT Pet: trimaps, and a val split out of trainval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_a_trimap_is_pet_background_and_no_label(build: Callable[..., Any]) -> None:
    benchmark = build("oxford_pets")
    assert benchmark.class_names == ("background", "pet")
    assert benchmark.dataset("test").names == ["pug_3"]
    assert benchmark.dataset("test")[0][1][:, 0].tolist() == [1, 0, 255]


def test_val_is_a_seeded_share_of_trainval(build: Callable[..., Any]) -> None:
    held = {build("oxford_pets", split_seed=seed).dataset("val").names[0] for seed in range(8)}
    assert held == {"Abyssinian_1", "Birman_2"}


def test_the_published_sizes_follow_the_share(
    build: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    build("oxford_pets", val_ratio=0.25)
    assert "train has 1 of 2760 images, val has 1 of 920 images, test has 1 of 3669" in (
        capsys.readouterr().err
    )


def test_a_share_that_leaves_nothing_is_refused(refusal: Callable[..., str]) -> None:
    assert "data.options.val_ratio: 1.0 of 2 images" in refusal("oxford_pets", val_ratio=1.0)
