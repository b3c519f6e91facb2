"""Depth: scores by hand, and a head that finds what its features hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks.shapes import Shapes
from distill.errors import UserError
from distill.evaluation.depth import (
    BINS,
    Binned,
    depth_probe,
    depth_scores,
    mean_scores,
    measure,
    scale_invariant_loss,
)
from distill.evaluation.linear import fit


class Seeing:
    """A backbone that sees the depth: four one-hot channels, from the image's red."""

    layers, parameters = ("depth",), 0
    channels = {"depth": 4}  # noqa: RUF012

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        layers = (images[:, 0] * 255).round().long() - 1
        return {"depth": F.one_hot(layers, 4).permute(0, 3, 1, 2).float()}


class Blind(Seeing):
    """It gives nothing away."""

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"depth": torch.ones(len(images), 4, *images.shape[-2:])}


def red(depths: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 whose red is the depth (B, H, W)."""
    return depths[:, None].expand(-1, 3, -1, -1).byte()


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    """(24, 8, 8): depths of `shapes`, a pixel in four."""
    examples = Shapes(size=32, train=24).depths("train")
    return torch.stack([examples[index][1][::4, ::4] for index in range(24)])


def learnt(backbone: Seeing, scenes: Tensor) -> float:
    probe = depth_probe(backbone, [1e-3, 3e-2], (0.5, 4.5), seed=0)  # type: ignore[arg-type]
    batch = (red(scenes[:16]) / 255.0, scenes[:16])
    fit(probe, [batch] * 120, steps=120, loss=scale_invariant_loss)
    held = list(zip(red(scenes[16:]), scenes[16:], strict=True))
    slow, fast = measure(probe, held, device="cpu", batch=3)
    assert len(fast) == len(held)
    rmse = mean_scores(fast, "shapes").rmse
    assert rmse <= mean_scores(slow, "shapes").rmse + 1e-3
    return rmse


def test_a_backbone_that_sees_the_depth_makes_almost_no_error(scenes: Tensor) -> None:
    assert learnt(Seeing(), scenes) < 0.1


def test_a_backbone_that_sees_nothing_errs_as_a_constant_does(scenes: Tensor) -> None:
    constants = [scenes[16:].sub(c).square().mean((1, 2)).sqrt().mean() for c in range(1, 5)]
    assert learnt(Blind(), scenes) > 0.9 * min(constants)


def test_scores_are_those_by_hand() -> None:
    truth = torch.tensor([[1.0, 2.0], [4.0, math.nan]])
    guess = torch.tensor([[2.0, 2.0], [3.0, 9.0]])
    scores = depth_scores(guess, truth)
    assert scores.rmse == pytest.approx(math.sqrt((1 + 0 + 1) / 3))
    assert scores.abs_rel == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert scores.delta1 == pytest.approx(1 / 3)  # 2, 1 and 4/3 times
    assert depth_scores(torch.tensor([[1.25]]), torch.tensor([[1.0]])).delta1 == 0.0
    assert depth_scores(torch.tensor([[1.24]]), torch.tensor([[1.0]])).delta1 == 1.0


def test_a_head_that_diverged_is_the_worst_and_not_unknown() -> None:
    scores = depth_scores(torch.full((2, 2), torch.nan), torch.ones(2, 2))
    assert scores == (math.inf, math.inf, 0.0)
    assert mean_scores([scores], "rooms").rmse == math.inf


def test_means_are_over_the_images_with_known_depth() -> None:
    one, two = torch.ones(2, 2), torch.full((2, 2), 2.0)
    nothing = torch.full((2, 2), math.nan)
    each = [depth_scores(one, truth) for truth in (one, two, nothing)]
    assert mean_scores(each, "a").rmse == pytest.approx((0 + 1) / 2)
    with pytest.raises(UserError, match="a: the split has no pixels of known depth"):
        mean_scores(each[2:], "a")


def test_guesses_are_scored_at_the_resolution_of_each_truth() -> None:
    def halves(images: Tensor) -> list[Tensor]:
        return [torch.tensor([[[1.0, 3.0]]]).expand(len(images), 1, 2)]

    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    truths = [torch.tensor([[1.0, 1.5, 2.5, 3.0]]), torch.tensor([[1.0, 3.0], [1.0, 3.0]])]
    items = [(image, truth) for truth in truths]
    ((wide, small),) = measure(halves, items, device="cpu", batch=2)
    assert (wide.rmse, small.rmse) == (0.0, 0.0)


def test_bins_are_uniform_and_weighted_linearly() -> None:
    binned = Binned(1.0, 10.0)
    assert binned.centres[[0, -1]].tolist() == [1.0, 10.0]
    assert torch.allclose(binned.centres.diff(), torch.tensor(9.0 / (BINS - 1)), atol=1e-5)
    logits = torch.full((1, BINS, 1, 2), -3.0)
    logits[0, 0, 0, 1] = 25.5  # and 0.1 for all: 25.6 of 51.1
    guess = binned(logits)
    assert guess.shape == (1, 1, 2)
    assert guess[0, 0, 0] == pytest.approx(5.5, abs=1e-4)
    assert guess[0, 0, 1] == pytest.approx((25.5 * 1.0 + 25.6 * 5.5) / 51.1, abs=1e-3)


def test_the_loss_is_by_hand_and_forgives_a_scale() -> None:
    truth = torch.tensor([[[1.0, 2.0, math.nan]]])
    guess = truth.nan_to_num(5.0) * torch.tensor([[[math.e, 1.0, 7.0]]])
    # Logarithms 1 and 0 off: sqrt(1/2 - 0.85 / 4).
    assert scale_invariant_loss(guess, truth).item() == pytest.approx(math.sqrt(0.2875), abs=1e-4)
    scaled = scale_invariant_loss(math.e * truth.nan_to_num(5.0), truth).item()
    assert scaled == pytest.approx(math.sqrt(0.15), abs=1e-4)


def test_the_loss_has_a_gradient_everywhere() -> None:
    for truth in (torch.ones(1, 2, 2), torch.full((1, 2, 2), math.nan)):
        guess = torch.ones(1, 2, 2, requires_grad=True)
        loss = scale_invariant_loss(guess, truth)
        (gradient,) = torch.autograd.grad(loss, guess)
        assert gradient.isfinite().all()
