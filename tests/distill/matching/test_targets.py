"""What a policy's answer becomes: bins and timesteps, or the weights of a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.matching.targets import choose, mixture
from rl_policy.simple import Fixed
from rl_policy.soft_mix import SoftMix

TIMESTEPS = torch.tensor([0, 100, 500])


def test_a_choice_has_the_timesteps_of_its_bins() -> None:
    policy = Fixed(2, 3, 4, 0, bin=2)
    choice = choose(policy, TIMESTEPS, torch.zeros(2, 2), torch.Generator(), 0.0)
    assert (choice.bins.tolist(), choice.timesteps.tolist()) == ([2, 2], [500, 500])
    assert choice.to(torch.device("cpu")).weights is None


def test_a_mixture_has_its_mean_timestep_and_the_nearest_bin() -> None:
    policy = SoftMix(2, 3, 4, 0)
    choice = choose(policy, TIMESTEPS, torch.zeros(2, 2), torch.Generator(), 0.0)
    assert (choice.bins.tolist(), choice.timesteps.tolist()) == ([1, 1], [200, 200])
    assert choice.weights is not None
    torch.testing.assert_close(choice.weights, torch.full((2, 3), 1 / 3))
    moved = choice.to(torch.device("cpu")).weights
    assert moved is not None
    assert moved.is_leaf
    assert moved.requires_grad


def test_a_mixture_of_maps_is_their_weighted_sum_with_a_gradient_to_the_weights() -> None:
    maps = torch.randn(3, 2, 4, 2, 2)  # bins, images

    def at(bins: Tensor) -> dict[str, Tensor]:
        assert bins.unique().numel() == 1
        return {"a": maps[int(bins[0])], "b": 2 * maps[int(bins[0])]}

    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], requires_grad=True)
    mixed = mixture(weights, at)
    expected = 0.2 * maps[0, 0] + 0.3 * maps[1, 0] + 0.5 * maps[2, 0]
    torch.testing.assert_close(mixed["a"][0], expected)
    torch.testing.assert_close(mixed["b"][1], 2 * maps[0, 1])
    (gradient,) = torch.autograd.grad(mixed["a"].sum(), weights)
    assert gradient[1, 2].item() == pytest.approx(maps[2, 1].sum().item())
