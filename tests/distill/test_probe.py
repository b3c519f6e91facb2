"""The linear probe: ridge regression by hand, and scores of features that are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge as Reference  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.probe import Ridge, linear_probe


def fitted(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    ridge = Ridge(x.shape[1], classes)
    ridge.update(x, y)
    return ridge.solve(penalty)


def teacher(features: Callable[[Tensor], Tensor], channels: int) -> Any:
    return SimpleNamespace(
        layers=["a", "b"],
        channels={"a": channels, "b": 9},
        features=lambda images, timesteps, generator: {"a": features(images)},
    )


@pytest.mark.parametrize(("penalty", "slope"), [(0.0, 0.5), (1.0, 0.25)])
def test_two_points_by_hand(penalty: float, slope: float) -> None:
    weight, bias = fitted(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 2, penalty)
    assert weight.tolist() == [[-slope, slope]]
    assert bias.tolist() == [0.5 + slope, 0.5 - slope]


def test_a_constant_channel_has_no_weight() -> None:
    x = torch.tensor([[0.0, 0.1, 0.0], [2.0, 0.1, 0.0]])
    weight, bias = fitted(x, torch.tensor([0, 1]), 2, penalty=1.0)
    assert weight.tolist() == [[-0.25, 0.25], [0, 0], [0, 0]]
    assert bias.tolist() == [0.75, 0.25]


def test_sums_in_pieces_are_scikit_learns_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) * torch.tensor([1e-3, 1, 10, 1, 1]) + 3
    y = torch.randint(4, (60,), generator=generator)
    ridge = Ridge(5, 4)
    for piece in (slice(0, 7), slice(7, 59), slice(59, 60)):
        ridge.update(x[piece], y[piece])
    weight, bias = ridge.solve(0.3)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    reference = Reference(alpha=0.3 * 60).fit(z.numpy(), F.one_hot(y).numpy())
    expected = torch.from_numpy(reference.predict(z.numpy()))
    torch.testing.assert_close(x.double() @ weight + bias, expected, rtol=1e-6, atol=1e-8)


def test_classification_is_probed_on_global_averages_and_without_label_left_out() -> None:
    levels = torch.tensor([0.1, 0.2, 0.8, 0.9])
    images = levels[:, None, None, None] * torch.tensor([2.0, 0.0])[:, None].expand(4, 3, 2, 2)
    targets = torch.tensor([0, 0, 1, 1])
    train = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    val = [(images, torch.tensor([0, 1, 1, 255]))]
    score = linear_probe(
        teacher(lambda images: images, 3), train, val, timestep=4, classes=2, dense=False
    )
    assert score == pytest.approx(2 / 3)


def test_segmentation_is_probed_at_the_positions_of_the_map() -> None:
    image = torch.zeros(1, 3, 4, 8)
    image[..., 4:] = 1
    mask = torch.zeros(1, 4, 8, dtype=torch.int64)
    mask[..., 4:] = 1
    wrong = mask.clone()
    wrong[:, 3, 1] = 1  # the pixel nearest to one of the 2x4 positions
    wrong[:, :2, 6:] = 255
    score = linear_probe(
        teacher(lambda images: F.avg_pool2d(images, 2), 3),
        [(image, mask)],
        [(image, wrong)],
        timestep=0,
        classes=3,
        dense=True,
    )
    assert score == pytest.approx((3 / 4 + 3 / 4) / 2)  # class 2 does not occur


def test_the_same_noise_and_timestep_are_shown_to_every_teacher() -> None:
    seen: list[tuple[list[int], float]] = []

    def features(images: Tensor, timesteps: Tensor, generator: torch.Generator) -> Any:
        seen.append((timesteps.tolist(), torch.rand((), generator=generator).item()))
        return {"a": images}

    one: Any = SimpleNamespace(layers=["a"], channels={"a": 3}, features=features)
    batch = [(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))]
    for _ in range(2):
        linear_probe(one, batch, batch, timestep=7, classes=2, dense=False)
    assert seen[:2] == seen[2:]
    assert [timesteps for timesteps, _ in seen] == [[7, 7]] * 4
    assert seen[0][1] != seen[1][1]


def test_a_probe_without_labels_is_refused() -> None:
    batch = [(torch.rand(2, 3, 2, 2), torch.tensor([255, 255]))]
    with pytest.raises(UserError, match="no labelled example"):
        linear_probe(
            teacher(lambda images: images, 3), batch, batch, timestep=0, classes=2, dense=False
        )
