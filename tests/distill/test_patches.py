"""`data.augment: patch`: random parts of images of any size, at a chosen scale."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.augmentation import augmentation
from distill.benchmarks.shapes import Shapes
from distill.build import training_examples
from distill.config import DataConfig
from distill.data import Augmented, Draw


def ramp(height: int, width: int) -> Tensor:
    """Red is the row, green the column, blue their sum."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows + columns]).byte()


def patches(image: Tensor, size: tuple[int, int], count: int = 40) -> list[Tensor]:
    views = Augmented([(image, 255)], augmentation("patch", None, size))
    return [views[Draw(0, seed)][0].mul(255).round().byte() for seed in range(count)]


def test_a_patch_is_a_part_of_the_image_or_its_mirror() -> None:
    image, seen = ramp(40, 50), set()
    for patch in patches(image, (16, 24)):
        flipped = bool(patch[1, 0, 0] > patch[1, 0, -1])
        upright = patch.flip(-1) if flipped else patch
        top, left = int(upright[0, 0, 0]), int(upright[1, 0, 0])
        assert torch.equal(upright, image[:, top : top + 16, left : left + 24])
        seen.add((top, left, flipped))
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert len(tops) > 10
    assert len(lefts) > 10
    assert flips == {True, False}


def test_a_smaller_image_is_mirrored_as_often_as_it_takes() -> None:
    patch = next(
        patch for patch in patches(ramp(40, 3), (16, 10)) if patch[1, 0].tolist()[3:6] == [0, 1, 2]
    )
    assert patch[1, 0].tolist() == [1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert patch.shape == (3, 16, 10)
    assert patches(ramp(1, 1), (16, 10), 1)[0].eq(0).all()


def test_a_mask_is_cut_and_mirrored_as_its_image() -> None:
    image = ramp(9, 50)
    views = Augmented([(image, image[2])], augmentation("patch", "segmentation", (16, 24)))
    for seed in range(20):
        patch, mask = views[Draw(0, seed)]
        assert isinstance(mask, Tensor)
        assert torch.equal(patch[2].mul(255).round().long(), mask)


def test_a_patch_at_half_the_scale_shows_twice_as_much() -> None:
    image = ramp(80, 90)
    spans = set()
    for low, high in ((0.5, 0.5), (0.5, 1.0)):
        change = augmentation("patch", "segmentation", (16, 24), patch_scale=(low, high))
        views = Augmented([(image, image[2])], change)
        for seed in range(20):
            patch, mask = views[Draw(0, seed)]
            assert patch.shape == (3, 16, 24)
            assert isinstance(mask, Tensor)
            assert torch.allclose(patch[2] * 255, mask.float(), atol=2.5)  # the nearest pixel
            step = (patch[0, -1, 0] - patch[0, 0, 0]) * 255 / 15  # rows of the image a row
            spans.add((low, high, round(float(step), 1)))
    halves = {step for low, high, step in spans if low == high}
    assert all(1.8 <= step <= 2.1 for step in halves)
    between = {step for low, high, step in spans if low < high}
    assert min(between) < 1.3
    assert max(between) > 1.7


def test_a_small_image_is_mirrored_for_a_patch_that_shows_more_than_it_has() -> None:
    views = Augmented(
        [(ramp(20, 20), 255)], augmentation("patch", None, (16, 16), patch_scale=(0.5, 0.5))
    )
    patch, _ = views[Draw(0, 0)]
    rows = patch[0, :, 0] * 255
    assert patch.shape == (3, 16, 16)
    assert rows.max() > 15
    assert rows.diff().min() < 0 < rows.diff().max()


def test_patches_are_cut_before_anything_is_resized() -> None:
    benchmark = Shapes(size=64, train=1, val=1, test=1)
    data = DataConfig(augment="patch")
    views = training_examples(benchmark.dataset("train"), data, benchmark, (32, 32))
    patch, _ = views[Draw(0, 0)]
    image = benchmark.dataset("train")[0][0]
    windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 33, 33, 32, 32)
    found = patch.mul(255).round().byte()[:, None, None]
    same = [(windows == x).flatten(3).all(3).all(0).any() for x in (found, found.flip(-1))]
    assert any(same)


def test_a_scale_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.05"):
        DataConfig(patch_scale=(5e-5, 5e-5))
