"""Keypoints: what sees their identity finds them all, what sees nothing does as chance has it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks.geometric import KeypointPair
from distill.evaluation.correspondence import features_at, judge, match, match_pairs, pck

SIDE = 24


class Identity:
    """A backbone whose feature is the one-hot number that a pixel has in its red channel."""

    name, layers, parameters = "identity", ("numbers",), 0

    def __init__(self) -> None:
        self.passes: list[int] = []

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        self.passes.append(len(images))
        numbers = (images[:, 0] * 255).round().long()
        return {"numbers": F.one_hot(numbers, 16).permute(0, 3, 1, 2).float()}


class Blank(Identity):
    """Every pixel has the same feature."""

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"blank": torch.ones(len(images), 1, *images.shape[-2:])}


def numbered(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image with the numbers 1 to 5 at pixels of which no two touch, and their centres."""
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    cells = torch.randperm((SIDE // 4) ** 2, generator=generator)[:5]
    rows, columns = 4 * (cells // (SIDE // 4)) + 1, 4 * (cells % (SIDE // 4)) + 2
    image[0, rows, columns] = torch.arange(1, 6).byte()
    return image, torch.stack([columns, rows], 1) + 0.5


def numbered_pairs(count: int) -> list[KeypointPair]:
    generator = torch.Generator().manual_seed(0)
    scenes = [numbered(generator) for _ in range(count + 1)]
    box = torch.tensor([0.0, 0.0, 12.0, 10.0])
    return [
        KeypointPair(
            names=(str(index), str(index + 1)),
            source=source,
            target=target,
            source_points=begin,
            target_points=end,
            box=box,
            category=("odd", "even")[index % 2],
        )
        for index, ((source, begin), (target, end)) in enumerate(pairwise(scenes))
    ]


def found_by(backbone: Identity, pairs: list[KeypointPair], batch: int = 64) -> dict[str, object]:
    matched = match_pairs(
        backbone,  # type: ignore[arg-type]
        pairs,
        range(len(pairs)),
        size=(SIDE, SIDE),
        device="cpu",
        batch=batch,
    )
    return pck(matched)


def test_what_sees_the_identity_finds_every_point() -> None:
    scores = found_by(Identity(), numbered_pairs(6))
    assert scores == {
        "pck_image": 1.0,
        "pck_image_points": 1.0,
        "pck_box_points": 1.0,
        "pck_box": 1.0,
        "category": {"even": 1.0, "odd": 1.0},
    }


def test_what_sees_nothing_does_as_well_as_the_first_pixel() -> None:
    pairs = numbered_pairs(40)
    scores = found_by(Blank(), pairs)
    # 0.1 of the box is 1.2 px and reaches no number; 0.1 of the image is 2.4 px from (0.5, 0.5),
    # which reaches the one of the first cell, at (2.5, 1.5).
    first = [(pair.target_points == torch.tensor([2.5, 1.5])).all(1).double() for pair in pairs]
    assert scores["pck_box"] == 0.0
    assert scores["pck_image"] == pytest.approx(float(torch.cat(first).mean()))
    assert 0.0 < float(torch.cat(first).mean()) < 0.1


def test_scores_depend_neither_on_the_batch_nor_on_what_else_is_in_it() -> None:
    pairs, backbone = numbered_pairs(5), Identity()
    assert found_by(backbone, pairs, 64) == found_by(Identity(), pairs, 2)
    assert backbone.passes == [6]  # an image of two pairs is seen once
    few = Identity()
    found_by(few, pairs, 4)
    assert max(few.passes) <= 4


def test_shares_are_of_pairs_or_of_points() -> None:
    """One point of one is right, and one of three: 2/3 over pairs, 2/4 over points."""
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    box = torch.tensor([10.0, 10.0, 30.0, 50.0])  # 20 by 40: right within 4 px; of the image 10

    def pair(points: list[list[float]], category: str) -> KeypointPair:
        ends = torch.tensor(points)
        return KeypointPair(("a", "b"), image, image, ends, ends, box, category)

    one, three = pair([[20.0, 20.0]], "cat"), pair([[0.0, 0.0], [50.0, 9.0], [7.0, 7.0]], "dog")
    exact = judge(0, one, torch.tensor([[24.0, 20.0]]))  # 4 px: on the border is right
    partly = judge(1, three, torch.tensor([[0.0, 0.0], [50.0, 13.5], [20.0, 7.0]]))
    assert exact.in_box.tolist() == [True]
    assert partly.in_box.tolist() == [True, False, False]
    assert partly.in_image.tolist() == [True, True, False]
    scores = pck([exact, partly])
    assert scores["pck_box"] == pytest.approx((1 + 1 / 3) / 2)
    assert scores["pck_box_points"] == pytest.approx(2 / 4)
    assert scores["pck_image"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["pck_image_points"] == pytest.approx(3 / 4)
    assert scores["category"] == {"cat": 1.0, "dog": pytest.approx(1 / 3)}


def test_features_are_bilinear_between_the_centres_of_cells() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (2, 1, 2): two cells, e1 and e2
    points = torch.tensor([[2.0, 1.0], [6.0, 1.0], [4.0, 3.0], [0.0, 0.0], [3.0, 2.0]])
    found = features_at([x], points, (4, 8))  # cells of 4 px, their centres at x = 2 and 6
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [3.0, 1.0]])
    assert torch.allclose(found, F.normalize(expected, dim=1), atol=1e-6)


def test_each_map_counts_alike_whatever_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, 4, 4, generator=generator), torch.rand(5, 2, 2, generator=generator)]
    points = 8 * torch.rand(6, 2, generator=generator)
    found = features_at(maps, points, (8, 8))
    assert found.shape == (6, 8)
    assert torch.allclose(found.norm(dim=1), torch.ones(6))
    assert torch.allclose(found[:, :3].norm(dim=1), torch.full((6,), 0.5**0.5))
    assert torch.allclose(found, features_at([100 * maps[0], maps[1]], points, (8, 8)), atol=1e-6)


def test_a_match_is_the_best_of_all_pixels_of_upsampled_features() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 9, 9, generator=generator)
    asked = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
    size = (90, 72)  # more pixels than are compared at a time
    found = match(asked, [x], size)
    full = F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]
    best = (asked @ F.normalize(full, dim=0).flatten(1)).argmax(1)
    expected = torch.stack([best % size[1], best // size[1]], 1) + 0.5
    assert torch.equal(found, expected)


class Places(Identity):
    """A feature for every place: red and green, which are x and y of `gradient`, as angles."""

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        angles = torch.pi * images[:, :2]
        return {"places": torch.cat([angles.cos(), angles.sin()], 1)}


def gradient(height: int, width: int) -> Tensor:
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    image = torch.zeros(3, height, width)
    image[0], image[1] = x, y[:, None]
    return (255 * image).round().byte()


def test_points_are_in_pixels_of_their_own_image_whatever_its_size() -> None:
    shares = torch.tensor([[0.2, 0.3], [0.5, 0.5], [0.85, 0.6]])
    pair = KeypointPair(
        names=("a", "b"),
        source=gradient(40, 64),
        target=gradient(90, 50),
        source_points=shares * torch.tensor([64.0, 40.0]),
        target_points=shares * torch.tensor([50.0, 90.0]),
        box=torch.tensor([0.0, 0.0, 50.0, 90.0]),
        category="gradient",
    )
    (matched,) = match_pairs(
        Places(),  # type: ignore[arg-type]
        [pair],
        [0],
        size=(48, 32),
        device="cpu",
        batch=2,
    )
    pixel = torch.tensor([50 / 32, 90 / 48])
    assert ((matched.found - pair.target_points).abs() < pixel).all()
