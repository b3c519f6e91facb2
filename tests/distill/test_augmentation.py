"""What augmentation does to an image it does to its mask, pixel by pixel."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from distill.augmentation import Strength, augmentation, mirror_mask
from distill.benchmarks.celebamask_hq import PARTS, _mirrored
from distill.data import Augmented, Draw
from tests.distill.test_data import Blocks

STRENGTHS = get_args(Strength)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_mask_stays_on_its_image(strength: Strength) -> None:
    examples = Augmented(Blocks(4), augmentation(strength, "segmentation", (24, 32)))
    for seed in range(20):
        image, mask = examples[Draw(seed % 4, seed)]
        assert isinstance(mask, Tensor)
        # Colour jitter moves red, and cropping blurs the borders; the order of the two stays.
        inside, outside = image[0][mask == 1], image[0][mask == 0]
        wrong = (inside < 0.4).sum() + (outside > 0.6).sum()
        assert wrong <= 0.1 * mask.numel()


def test_none_changes_nothing_and_flip_only_flips() -> None:
    original = Blocks(1)[0][0] / 255
    none = Augmented(Blocks(1), augmentation("none", "segmentation", (24, 32)))
    assert torch.equal(none[Draw(0, 5)][0], original)
    flip = Augmented(Blocks(1), augmentation("flip", "segmentation", (24, 32)))
    flipped = [torch.equal(flip[Draw(0, seed)][0], original.flip(2)) for seed in range(20)]
    same = [torch.equal(flip[Draw(0, seed)][0], original) for seed in range(20)]
    assert any(flipped)
    assert any(same)
    assert all(a or b for a, b in zip(flipped, same, strict=True))


def test_classification_is_shifted_by_up_to_an_eighth_at_its_own_scale() -> None:
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    change = augmentation("crop", "classification", (32, 48))
    shifts = []
    torch.manual_seed(0)
    for _ in range(200):
        middle = change(image, 1)[0][:2, 12:20, 12:36].long()
        if middle[1, 0, 1] < middle[1, 0, 0]:  # mirrored
            middle = middle.flip(-1)
        assert (middle[0].diff(dim=0) == 1).all()
        assert (middle[1].diff(dim=1) == 1).all()
        shifts.append((int(middle[0, 0, 0]) - 12, int(middle[1, 0, 0]) - 12))
    assert [(min(x), max(x)) for x in zip(*shifts, strict=True)] == [(-4, 4), (-6, 6)]


def test_faces_are_turned_and_scaled_around_the_middle() -> None:
    change = augmentation("crop", "landmarks", (32, 48), mirrored=(0, 1, 2))
    points = torch.tensor([[0.5, 0.5], [0.7, 0.5], [0.5, 0.8]])
    angles, scales = [], []
    torch.manual_seed(0)
    for _ in range(300):
        middle, right, below = change(torch.zeros(3, 32, 48, dtype=torch.uint8), points)[1]
        torch.testing.assert_close(middle, points[0])
        px = torch.tensor([48.0, 32.0])
        across, down = (right - middle) * px, (below - middle) * px
        assert across @ down == pytest.approx(0, abs=1e-3)  # no part is sheared
        assert across.norm() / 9.6 == pytest.approx(down.norm().item() / 9.6)
        scales.append(across.norm().item() / 9.6)
        angles.append(math.degrees(math.atan2(across[1], abs(across[0]))))
    assert 0.75 <= min(scales) < 0.77 < 1.23 < max(scales) <= 1.25
    assert -30 <= min(angles) < -28 < 28 < max(angles) <= 30


@pytest.mark.parametrize("strength", STRENGTHS)
def test_classification_keeps_size_and_class(strength: Strength) -> None:
    examples = Augmented(
        Blocks(6, "classification"), augmentation(strength, "classification", (24, 32))
    )
    for seed in range(10):
        image, target = examples[Draw(5, seed)]
        assert image.shape == (3, 24, 32)
        assert target == 5
        assert strength == "strong" or image[1].min() == image[1].max()  # no black border


@pytest.mark.parametrize(
    ("strength", "patch_scale"),
    [("crop", (1.0, 1.0)), ("patch", (1.0, 1.0)), ("patch", (0.75, 0.75)), ("patch", (2.0, 2.0))],
)
def test_a_mask_is_not_shifted_against_its_image(
    strength: Strength, patch_scale: tuple[float, float]
) -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).repeat(64, 1)
    size = (64, 64) if strength == "crop" else (32, 32)
    change = augmentation(strength, "segmentation", size, patch_scale=patch_scale)
    examples = Augmented([(ramp.repeat(3, 1, 1), ramp)], change)
    shifts = []
    for seed in range(100):
        image, mask = examples[Draw(0, seed)]
        assert isinstance(mask, Tensor)
        pixels = (mask - 255 * image[0])[:, 6:-6] / 4  # of the original image, to the right
        mirrored = bool(mask[0, 0] > mask[0, -1])
        shifts.append((-pixels if mirrored else pixels).mean().item())
    assert abs(sum(shifts) / len(shifts)) < 0.05


def test_in_the_mirror_left_parts_are_right_ones() -> None:
    names = ("background", *PARTS)
    left, right, lip = map(names.index, ("l_eye", "r_eye", "l_lip"))
    mask = torch.tensor([[left, left, lip, right, 255]], dtype=torch.uint8)
    mirrored = _mirrored(names)
    assert mirror_mask(mask, mirrored).tolist() == [[255, left, lip, right, right]]
    change = augmentation("flip", "segmentation", (1, 5), mirrored=mirrored)
    image = torch.zeros(3, 1, 5, dtype=torch.uint8)
    image[:, :, :2] = 200
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = [change(image, mask) for _ in range(20)]
    for changed, moved in seen:
        assert isinstance(moved, Tensor)
        was = changed[0, 0, 0] == 200
        assert moved.tolist() == (mask if was else mirror_mask(mask, mirrored)).tolist()
        assert type(changed) is type(moved) is Tensor
    assert 0 < sum(bool(changed[0, 0, 0] == 200) for changed, _ in seen) < 20


@pytest.mark.parametrize("strength", [strength for strength in STRENGTHS if strength != "none"])
def test_in_the_mirror_an_image_of_a_left_class_is_one_of_a_right_one(strength: Strength) -> None:
    change = augmentation(strength, "classification", (16, 16), mirrored=(0, 2, 1))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, :8] = 200
    became = {True: set[int](), False: set[int]()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(20):
            changed, target = change(image, 1)
            flipped = bool(changed[0, :, 0].float().mean() < changed[0, :, -1].float().mean())
            became[flipped].add(int(target))
        assert became == {True: {2}, False: {1}}
        assert {change(image, 255)[1] for _ in range(9)} == {255}
        assert {change(image, -1)[1] for _ in range(9)} == {-1}
