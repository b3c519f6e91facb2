"""One column of the map: streamed sums, rewards by hand, wide layers, and a planted layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.probing import layer_map
from distill.probing.layer_map import TEMPERATURES, Parts, ProbeResult, measure
from distill.probing.linear_probe import Logistic, Ridge

Batch = list[tuple[Tensor, Tensor]]


def teacher(**layers: Callable[[Tensor], Tensor]) -> Any:
    """Layers that are functions of the images alone, with their number of channels."""
    maps = {name: layer(torch.zeros(1, 3, 4, 4)) for name, layer in layers.items()}
    return SimpleNamespace(
        layers=list(layers),
        channels={name: x.shape[1] for name, x in maps.items()},
        features=lambda images, timesteps, generator: {
            name: layer(images) for name, layer in layers.items()
        },
    )


def columns(masks: bool, count: int = 40) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 4, 4) and classes of 3, by the images' mean or the pixels' brightness."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 4, 4) if masks else (count,)
    targets = torch.randint(3, shape, generator=generator)
    levels = targets.float() if masks else targets.float()[:, None, None].expand(-1, 4, 4)
    images = levels[:, None] / 4 + 0.15 * torch.randn(count, 3, 4, 4, generator=generator)
    return images, targets


def parts(images: Tensor, targets: Tensor, size: int) -> Parts:
    def batches(start: int, stop: int) -> Callable[[], Batch]:
        pieces = range(start, stop, size)
        return lambda: [
            (images[i : min(i + size, stop)], targets[i : min(i + size, stop)]) for i in pieces
        ]

    return Parts(batches(0, 20), batches(20, 25), batches(25, len(images)))


def pixels(images: Tensor) -> Tensor:
    return torch.cat([images, images.square()], dim=1)


def test_a_class_255_counts_where_something_else_means_no_label() -> None:
    images, targets = columns(masks=False)
    targets = torch.where(targets == 2, 255, targets)
    seen = parts(images, targets, 8)
    one = teacher(a=pixels)
    cell = measure(one, 0, seen, classes=256, dense=False, ignore_index=-1)["a"]
    assert not cell.rewards.isnan().any()
    cell = measure(one, 0, seen, classes=255, dense=False)["a"]
    assert torch.equal(cell.rewards[0].isnan(), targets[25:] == 255)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("probe", [Ridge, Logistic])
def test_streamed_equals_all_at_once(masks: bool, probe: type[Ridge]) -> None:
    images, targets = columns(masks)
    found: list[ProbeResult] = []
    for size in (3, 40):
        cells = measure(
            teacher(a=pixels), 0, parts(images, targets, size), classes=3, dense=masks, probe=probe
        )
        found.append(cells["a"])
    assert found[0][:1] + found[0][2:4] == found[1][:1] + found[1][2:4]
    assert found[0].held_loss == pytest.approx(found[1].held_loss)
    assert found[0].effective_rank == pytest.approx(found[1].effective_rank)
    torch.testing.assert_close(found[0].rewards, found[1].rewards)
    assert found[0].score > (0.6 if masks else 0.9)
    assert found[0].rewards.shape == (1, 15)


def test_rewards_are_minus_the_mean_cross_entropy_of_an_image() -> None:
    images, targets = columns(masks=True)
    targets[25, :2] = 255
    targets[26] = 255
    seen = parts(images, targets, 7)
    cell = measure(teacher(a=pixels), 0, seen, classes=3, dense=True)["a"]
    ridge = Ridge(6, 3)
    x, y = pixels(images).permute(0, 2, 3, 1), targets
    ridge.update(x[:25].flatten(0, 2), y[:25].flatten())
    weight, bias = ridge.solve(cell.penalty)
    logits = (x.double() @ weight + bias).permute(0, 3, 1, 2) / cell.temperature
    for place, index in enumerate((25, 26, 27)):
        loss = F.cross_entropy(logits[index][None], y[index][None], ignore_index=255)
        torch.testing.assert_close(cell.rewards[0, place].double(), -loss, equal_nan=True)
    assert cell.rewards[0].isnan().tolist() == [False, True] + 13 * [False]


def test_what_says_nothing_gets_the_reward_of_guessing() -> None:
    images, targets = columns(masks=False, count=400)
    generator = torch.Generator().manual_seed(5)

    def noise(images: Tensor) -> Tensor:
        return torch.randn(len(images), 4, 1, 1, generator=generator)

    seen = Parts(*(lambda i=i: [(images[i::4], targets[i::4])] for i in range(3)))  # type: ignore[misc]
    cell = measure(teacher(a=noise), 0, seen, classes=3, dense=False)["a"]
    assert cell.rewards.mean().item() == pytest.approx(-torch.tensor(3.0).log().item(), abs=0.1)
    assert cell.temperature == TEMPERATURES[-1]


def test_the_layer_that_tells_the_classes_is_found_and_a_wide_one_is_narrowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, targets = columns(masks=False)
    wide = torch.randn(6, 50, generator=torch.Generator().manual_seed(6))
    wide[:, :2] *= 1e4  # as the few huge channels of a transformer, and one that says nothing
    wide[:, 2] = 0
    layers = {
        "blind": lambda images: 0 * images + 1,
        "seeing": lambda images: torch.einsum("bchw,cd->bdhw", pixels(images), wide),
    }
    monkeypatch.setattr(layer_map, "WIDTH", 20)
    cells = measure(teacher(**layers), 0, parts(images, targets, 8), classes=3, dense=False)
    assert cells["blind"].score <= 0.6
    assert cells["blind"].effective_rank == 0
    assert cells["seeing"].score > 0.9
    assert 1 <= cells["seeing"].effective_rank <= 6.01


def test_draws_differ_in_their_noise_and_teachers_do_not() -> None:
    seen: list[float] = []

    def features(images: Tensor, timesteps: Tensor, generator: torch.Generator) -> Any:
        seen.append(torch.rand((), generator=generator).item())
        return {"a": images}

    one: Any = SimpleNamespace(layers=["a"], channels={"a": 3}, features=features)
    images, targets = columns(masks=False)
    looks = [
        measure(one, t, parts(images, targets, 40), classes=3, dense=False, draws=draws)
        for t, draws in ((0, 2), (5, 1))
    ]
    assert seen[:3] == seen[4:]
    assert len(set(seen[:4])) == 4
    assert looks[0]["a"].rewards.shape == (2, 15)


@pytest.mark.parametrize(
    ("part", "words"), [(0, "for the probe"), (1, "held-out"), (2, "to score")]
)
def test_a_part_without_labels_is_refused(part: int, words: str) -> None:
    images, targets = columns(masks=False)
    targets[[slice(0, 20), slice(20, 25), slice(25, 40)][part]] = 255
    with pytest.raises(UserError, match=f"no labelled examples.*{words}"):
        measure(teacher(a=pixels), 0, parts(images, targets, 8), classes=3, dense=False)


def test_features_that_are_not_finite_are_refused() -> None:
    images, targets = columns(masks=False)
    wild = teacher(a=lambda x: x / 0)
    with pytest.raises(UserError, match=r"'a' is not finite at timestep 7; try teacher\.dtype"):
        measure(wild, 7, parts(images, targets, 8), classes=3, dense=False)
