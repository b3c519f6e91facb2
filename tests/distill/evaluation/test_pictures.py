"""The pictures of an evaluation fit a screen and name what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.evaluation import pictures
from distill.evaluation.geometry import best_and_worst
from distill.evaluation.pictures import Prediction


def overlays(path: Path, size: tuple[int, int], count: int) -> np.ndarray:
    """So many grey images with two of three classes; returns the picture (H, W, 3)."""
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(size, dtype=torch.int64)
    mask[:, size[1] // 2 :] = 1
    mask[0] = 255
    palette = [(30, 60, 200), (0, 150, 90), (200, 10, 10)]
    shown = [Prediction(f"best: {i}", image, mask, 1 - mask.clamp(max=1)) for i in range(count)]
    pictures.overlays(path, shown, ("sky", "car", "tree"), palette)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("size", [(24, 24), (64, 16), (12, 32)])
def test_the_best_and_worst_images_fit_a_screen(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width, _ = overlays(tmp_path / "a.png", size, 8).shape
    assert height <= 1600
    assert width <= 2100


def test_one_image_leaves_no_place_for_a_second(tmp_path: Path) -> None:
    assert overlays(tmp_path / "a.png", (24, 24), 1).shape[1] < 1100


def test_the_legend_names_the_classes_that_occur(tmp_path: Path) -> None:
    pixels = overlays(tmp_path / "a.png", (24, 24), 3)
    below = pixels[-40:].reshape(-1, 3)
    found = {tuple(colour) for colour in np.unique(below, axis=0).tolist()}
    assert {(30, 60, 200), (0, 150, 90)} <= found
    assert (200, 10, 10) not in found


def test_masks_of_any_sizes_are_drawn_in_the_palettes_colours(tmp_path: Path) -> None:
    grey, large, small = (
        torch.full((3, 12, 16), 0.5),
        torch.zeros(24, 32).long(),
        torch.ones(12, 16),
    )
    void = torch.full((12, 16), 255)
    shown = [Prediction("", grey, large, large + 1), Prediction("", grey, void, small.long())]
    pictures.overlays(tmp_path / "a.png", shown, ("left", "right"), [(255, 0, 0), (0, 0, 255)])
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    reddish, bluish = (pixels[..., a] - pixels[..., b] > 60 for a, b in ((0, 2), (2, 0)))
    assert bluish.sum() == pytest.approx(2 * reddish.sum(), rel=0.2)
    assert reddish.mean() > 0.05


def test_classes_are_written_below_in_the_colours_of_right_and_wrong(tmp_path: Path) -> None:
    images, truths = torch.rand(9, 3, 8, 8), torch.zeros(9).long()

    def red_text(name: str, guesses: torch.Tensor) -> bool:
        shown = [Prediction("", *item) for item in zip(images, truths, guesses, strict=True)]
        pictures.overlays(tmp_path / name, shown, ("left", "right"), [])
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return bool((pixels == (0xC0, 0x39, 0x2B)).all(-1).any())

    assert red_text("wrong.png", truths + 1)
    assert not red_text("right.png", truths)


def test_few_images_are_halved_into_best_and_worst() -> None:
    assert best_and_worst([7]) == [("best", 7)]
    assert best_and_worst([3, 1, 2]) == [("best", 3), ("best", 1), ("worst", 2)]
    four = best_and_worst(range(20))
    assert [index for kind, index in four if kind == "best"] == [0, 1, 2, 3]
    assert [index for kind, index in four if kind == "worst"] == [19, 18, 17, 16]


def test_a_confusion_of_many_classes_ends_within_the_picture(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(120)]
    pictures.confusion(tmp_path / "a.png", torch.eye(120, dtype=torch.int64), names)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge > 200).all()


def test_rare_confusions_of_many_classes_can_be_seen(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(40)]
    counts = 95 * torch.eye(40, dtype=torch.int64)
    counts[:, 5] += 5  # one in twenty of each class is taken for this one
    pictures.confusion(tmp_path / "a.png", counts, names)
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    width = drawn.shape[1]
    column = drawn[:, int(0.05 * width) : int(0.85 * width)].min(axis=2)
    faint = ((column > 150) & (column < 225)).mean(axis=0)
    assert faint.max() > 0.5  # of a column of the picture
