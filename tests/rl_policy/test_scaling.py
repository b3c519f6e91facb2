"""Running scales, by hand."""

import pytest
import torch

from rl_policy.scaling import RunningScale


def test_running_scale_is_at_first_that_of_all_samples_so_far() -> None:
    scale = RunningScale()
    scale.update(torch.tensor([0.0, 2.0]))
    scale.update(torch.tensor([4.0, 10.0]))
    # 0, 2, 4, 10: mean 4, variance (16 + 4 + 0 + 36) / 4
    assert scale.mean.item() == pytest.approx(4)
    assert scale.variance.item() == pytest.approx(14)
    assert scale(torch.tensor([4 + 14**0.5])).item() == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_rewards_are_standardised_on_any_scale(scale: float) -> None:
    running = RunningScale(floor=0)
    running.update(scale * torch.tensor([0.0, 2.0]))
    assert running(scale * torch.tensor([2.0])).item() == pytest.approx(1)
    running = RunningScale(floor=0)  # of rewards that do not vary, rounding is no signal
    running.update(torch.full((3,), scale))
    assert abs(running(torch.tensor([scale * (1 + 2**-23)])).item()) < 1.5


def test_running_scale_forgets_the_distant_past() -> None:
    scale = RunningScale()
    for level in (0.0, 100.0):
        for _ in range(1000):
            scale.update(torch.tensor([level - 1, level + 1]))
    # What is left of the first level weighs 0.99 ** 1000, 4e-5
    assert scale.mean.item() == pytest.approx(100, abs=0.01)
    assert scale.variance.item() == pytest.approx(1, abs=0.5)


def test_running_scale_is_per_number_and_clipped_and_first_passes_on() -> None:
    scale = RunningScale(2)
    assert scale(torch.tensor([[0.5, -3.0]])).tolist() == [[0.5, -3.0]]
    scale.update(torch.tensor([[0.0, 7.0], [2.0, 7.0]]))
    assert scale(torch.tensor([[2.0, 8.0], [1.0, 7.0]])).tolist() == [[1.0, 10.0], [0.0, 0.0]]


def test_unclipped_scale_lets_outliers_be() -> None:
    scale = RunningScale(clip=None)
    scale.update(torch.tensor([0.0, 2.0]))
    assert scale(torch.tensor([101.0])).item() == pytest.approx(100)
