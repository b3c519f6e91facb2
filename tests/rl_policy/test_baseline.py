"""What an image earned before is taken off, and nothing that the choice of the moment made."""

import pytest
import torch

from rl_policy.baseline import FORGETTING, ImageBaseline


def test_an_image_is_set_against_what_it_earned_before() -> None:
    baseline = ImageBaseline(3)
    positions = torch.tensor([0, 2])
    # The mean of all is taken off, 3; the images have earned nothing before
    assert baseline(positions, torch.tensor([1.0, 5.0])).tolist() == [-2, 2]
    # Each has by now the mean of 0 and what it earned: -1 and 1
    assert baseline(positions, torch.tensor([1.0, 5.0])).tolist() == [-1, 1]
    # The mean of 0 and two rewards: -4/3 and 4/3; one that is new has 0
    assert baseline.own.tolist() == pytest.approx([-4 / 3, 0, 4 / 3])
    assert baseline(torch.tensor([1]), baseline.all.mean[None]).tolist() == pytest.approx([0])


def test_an_image_that_is_not_known_counts_from_the_mean_of_all() -> None:
    baseline = ImageBaseline(1)
    positions = torch.tensor([0, -1])
    for _ in range(5):
        rewards = baseline(positions, torch.tensor([1.0, 3.0]))
    assert rewards[1] == 1
    assert abs(rewards[0]) < 0.2
    assert baseline.visits.tolist() == [5]


def test_an_image_twice_in_a_step_counts_twice_in_either_order() -> None:
    first, second = ImageBaseline(1), ImageBaseline(1)
    first(torch.tensor([0, 0]), torch.tensor([1.0, 3.0]))
    second(torch.tensor([0, 0]), torch.tensor([3.0, 1.0]))
    assert first.visits.tolist() == [2]
    assert torch.equal(first.own, second.own)
    # Above the mean, 2, by -1 and 1, and then by 1 twice: of three, the first of which is 0
    first.all.update = lambda rewards: None  # type: ignore[method-assign]
    first(torch.tensor([0, 0]), torch.tensor([3.0, 3.0]))
    assert first.own.item() == pytest.approx(2 / 5)


def test_what_an_image_earned_long_ago_is_forgotten() -> None:
    baseline, positions = ImageBaseline(2), torch.tensor([0, 1])
    for _ in range(50):
        baseline(positions, torch.tensor([1.0, -1.0]))
    before = baseline.own[0].item()
    for _ in range(50):
        baseline(positions, torch.tensor([-1.0, 1.0]))
    assert before == pytest.approx(1, abs=0.05)
    assert baseline.own[0].item() == pytest.approx(-1, abs=3 * (1 - FORGETTING) ** 50 + 0.02)


def test_it_goes_on_where_it_was() -> None:
    baseline, resumed = ImageBaseline(4), ImageBaseline(4)
    generator = torch.Generator().manual_seed(0)

    def step(of: ImageBaseline, rewards: torch.Tensor) -> torch.Tensor:
        return of(torch.arange(4), rewards)

    step(baseline, torch.randn(4, generator=generator))
    resumed.load_state_dict(baseline.state_dict())
    rewards = torch.randn(4, generator=generator)
    assert torch.equal(step(resumed, rewards), step(baseline, rewards))
