"""Figures of a policy against distributions whose entropy is known."""

import math

import pytest
import torch

from rl_policy.summary import policy_summary


def test_two_certain_images_that_differ_are_two_arms_without_entropy_an_image() -> None:
    summary = policy_summary(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    assert summary.mean.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert summary.entropy == pytest.approx(math.log(2))
    assert summary.effective_arms == pytest.approx(2)
    assert summary.image_entropy == 0


def test_a_uniform_policy_has_as_many_arms_as_bins() -> None:
    summary = policy_summary(torch.full((3, 20), 1 / 20))
    assert summary.effective_arms == pytest.approx(20, rel=1e-5)
    assert summary.image_entropy == pytest.approx(math.log(20), rel=1e-5)
