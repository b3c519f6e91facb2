"""Projectors: what they compute, by hand, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from distill.matching.losses import FeatureLoss
from distill.matching.projectors import FiLM, Linear, PyramidRegressor

T = torch.tensor([0, 500])


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_linear_is_a_1x1_convolution_of_the_resized_map() -> None:
    projector, x = Linear([3], 5), maps(2, 3, 8, 8)
    expected = F.conv2d(F.avg_pool2d(x, 2), projector.weight, projector.bias)
    torch.testing.assert_close(projector([x], (4, 4), T), expected)


def test_film_begins_as_the_plain_convolution() -> None:
    projector, x = FiLM([3], 5), maps(2, 3, 4, 4)
    torch.testing.assert_close(projector([x], (4, 4), T), projector.convolution(x))


def test_film_can_follow_a_teacher_that_turns_with_the_timestep() -> None:
    """The teacher's map is x early and -x late: a plain projector can only answer 0."""
    torch.manual_seed(0)
    x = maps(64, 3, 2, 2)
    timesteps = torch.tensor([0, 900]).repeat(32)
    target = x * torch.tensor([1.0, -1.0]).repeat(32)[:, None, None, None]
    left = {}
    for name, projector in (("linear", Linear([3], 3)), ("film", FiLM([3], 3))):
        optimizer = torch.optim.Adam(projector.parameters(), 1e-2)
        for _ in range(300):
            loss = F.mse_loss(projector([x], (2, 2), timesteps), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[name] = loss.item()
    assert left["linear"] > 0.8
    assert left["film"] < 0.05


def test_pyramid_answers_at_the_grid_that_is_asked_for() -> None:
    projector = PyramidRegressor([4, 6, 8], 5, width=16)
    pyramid = [maps(2, 4, 16, 12), maps(2, 6, 8, 6), maps(2, 8, 4, 3)]
    assert projector(pyramid, (8, 6), T).shape == (2, 5, 8, 6)
    assert projector(pyramid, (16, 12), T).shape == (2, 5, 16, 12)


def test_every_map_of_the_pyramid_counts() -> None:
    projector = PyramidRegressor([4, 6, 8], 5, width=16)
    pyramid = [maps(2, 4, 8, 8), maps(2, 6, 4, 4), maps(2, 8, 2, 2)]
    for x in pyramid:
        x.requires_grad_()
    projector(pyramid, (8, 8), T).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in pyramid)


def test_the_deepest_map_is_seen_at_every_position() -> None:
    """Pyramid pooling: a far corner of the deepest map changes the opposite corner."""
    projector = PyramidRegressor([4, 8], 5, width=16)
    fine, deep = maps(1, 4, 32, 32), maps(1, 8, 16, 16)
    moved = deep.clone()
    moved[..., 0, 0] += 10.0
    before, after = (projector([fine, x], (32, 32), T[:1]) for x in (deep, moved))
    assert not torch.allclose(before[..., -1, -1], after[..., -1, -1])


@pytest.mark.parametrize("name", ["linear", "film"])
def test_one_map_projectors_refuse_several(name: str) -> None:
    with pytest.raises(UserError, match=rf"projector {name!r} needs one student map.* fpn_ppm"):
        FeatureLoss("mse", [3, 4], 5, projector=name)


def test_unknown_projector_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown projector 'flim'; did you mean 'film'\?"):
        FeatureLoss("mse", 3, 5, projector="flim")


def test_auto_takes_what_the_maps_need() -> None:
    kinds: list[type[nn.Module] | None] = []
    for measure, channels in (("mse", 5), ("mse", 3), ("at", 3), ("at", [3, 4]), ("mse", [3, 4])):
        projector = FeatureLoss(measure, channels, 5).projector
        kinds.append(None if projector is None else type(projector))
    assert kinds == [None, Linear, None, PyramidRegressor, PyramidRegressor]


def test_several_maps_without_a_projector_are_refused() -> None:
    with pytest.raises(
        UserError, match="compares 3 and 4 channels with 5, so it needs a projector"
    ):
        FeatureLoss("at", [3, 4], 5, projector="none")
