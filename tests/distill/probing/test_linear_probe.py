"""The linear probe: ridge regression by hand, and scores of features that are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.linear_model import Ridge as Reference
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.probing.linear_probe import Logistic, Ridge, effective_rank, labelled, linear_probe


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


def test_two_sums_are_that_of_all_examples() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 3, generator=generator), torch.arange(20) % 3
    whole, first, second = Ridge(3, 3), Ridge(3, 3), Ridge(3, 3)
    whole.update(x, y)
    first.update(x[:7], y[:7])
    second.update(x[7:], y[7:])
    first.add(second)
    for found, expected in zip(first.solve(0.1), whole.solve(0.1), strict=True):
        torch.testing.assert_close(found, expected)
    assert first.effective_rank() == pytest.approx(whole.effective_rank())


def test_logistic_is_scikit_learns_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, 4, generator=generator) * torch.tensor([1e-2, 1, 50, 1]) + 2
    x[:, 3] = 7  # constant
    y = (x[:, 1] + torch.randn(90, generator=generator) > 2).long() + (x[:, 2] > 20)
    probe = Logistic(4, 3)
    probe.update(x[:50], y[:50])
    probe.update(x[50:], y[50:])
    weight, bias = probe.solve(0.05)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    reference = LogisticRegression(C=1 / (0.05 * 90), tol=1e-8).fit(z[:, :3].numpy(), y.numpy())
    expected = torch.from_numpy(reference.predict_proba(z[:, :3].numpy()))
    torch.testing.assert_close((x.double() @ weight + bias).softmax(1), expected, rtol=0, atol=1e-4)
    assert weight[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([1, 1, 1, 1], 4), ([5, 0, 0], 1), ([2, 2, 0], 2), ([0.5, 0.25, 0.25], 2**1.5), ([0, 0], 0)],
)
def test_effective_rank_of_known_spectra(spectrum: list[float], rank: float) -> None:
    generator = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(
        torch.randn(len(spectrum), len(spectrum), generator=generator).double()
    ).Q
    covariance = turn @ torch.tensor(spectrum).double().diag() @ turn.T
    assert effective_rank(covariance) == pytest.approx(rank)


def test_effective_rank_is_that_of_the_centred_features() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 2, generator=generator).double()
    x = torch.linalg.qr(x - x.mean(0)).Q  # equal variance in two directions
    x = torch.cat([x, torch.ones(200, 1)], dim=1) + 5
    ridge = Ridge(3, 2)
    ridge.update(x, torch.arange(200) % 2)
    assert ridge.effective_rank() == pytest.approx(2, rel=1e-6)


def test_labelled_positions_know_their_image() -> None:
    masks = torch.tensor([[[0, 1], [255, 1]], [[2, 255], [255, 255]]])
    maps = torch.arange(8.0).reshape(2, 1, 2, 2)
    seen = labelled(maps, masks)
    assert seen.features.tolist() == [[0], [1], [3], [4]]
    assert seen.classes.tolist() == [0, 1, 1, 2]
    assert seen.images.tolist() == [0, 0, 0, 1]


def test_a_class_255_is_probed_where_something_else_means_no_label() -> None:
    seen = labelled(torch.ones(3, 1, 2, 2), torch.tensor([255, 3, -1]), ignore_index=-1)
    assert seen.classes.tolist() == [255, 3]
    images = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 3, 2, 2)
    batch = [(images, torch.tensor([0, 255]))]
    score = linear_probe(
        teacher(lambda images: images, 3),
        *(batch, batch),
        timestep=0,
        classes=256,
        dense=False,
        ignore_index=-1,
    )
    assert score == 1.0


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
    with pytest.raises(UserError, match="no labelled examples"):
        linear_probe(
            teacher(lambda images: images, 3), batch, batch, timestep=0, classes=2, dense=False
        )
