"""The posterior by hand, and what Thompson and UCB make of it."""

import math

import pytest
import torch
from torch import Generator

from rl_policy.bandits import UCB, GaussianBandit, Thompson

CONTEXT = torch.zeros(1, 2)


def see(policy: GaussianBandit, bins: list[int], rewards: list[float]) -> None:
    policy.learn(torch.zeros(len(bins), 2), torch.tensor(bins), torch.tensor(rewards), 0.0)


def test_the_posterior_is_that_of_normal_rewards_and_a_normal_prior() -> None:
    policy = Thompson(2, 3, 4, 0, discount=0.5, prior=2.0)
    see(policy, [0, 0, 1], [1.0, 3.0, 5.0])  # mean 3, variance 8 / 3
    mean, deviation = policy.posterior()
    scale = math.sqrt(8 / 3)
    # Precision: the rewards of a bin, and 1 / 4 of the prior, whose mean is that of all rewards
    assert mean.tolist() == pytest.approx([-2 / scale / 2.25, 2 / scale / 1.25, 0], abs=1e-6)
    assert deviation.tolist() == pytest.approx([2.25**-0.5, 1.25**-0.5, 2.0])
    see(policy, [2], [3.0])  # the others count for half now
    assert policy.counts.tolist() == [1.0, 0.5, 1.0]
    assert policy.sums.tolist() == [2.0, 2.5, 3.0]


def test_a_large_offset_of_the_rewards_changes_nothing() -> None:
    plain, far = (UCB(2, 3, 4, 0) for _ in range(2))
    for shift, policy in ((0.0, plain), (-4096.0, far)):
        see(policy, [0, 0, 1], [shift + x for x in (1.0, 3.0, 5.0)])
    torch.testing.assert_close(plain.posterior(), far.posterior())


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_the_scale_of_the_rewards_changes_nothing(scale: float) -> None:
    plain, scaled = (UCB(2, 3, 4, 0) for _ in range(2))
    for factor, policy in ((1.0, plain), (scale, scaled)):
        see(policy, [0, 0, 1], [factor * x for x in (1.0, 3.0, 5.0)])
    torch.testing.assert_close(plain.posterior(), scaled.posterior(), rtol=1e-5, atol=0)


def test_equal_rewards_tell_nothing() -> None:
    policy = Thompson(2, 3, 4, 0)
    for _ in range(50):
        see(policy, [0, 0, 1, 2], [-2.3] * 4)
    assert policy.posterior()[0].abs().max() < 1e-3


def test_thompson_chooses_a_bin_as_often_as_a_sample_of_it_is_the_largest() -> None:
    policy = Thompson(2, 4, 4, 0)
    see(policy, [0, 0, 1, 1, 1, 1, 2], [0.0, 1.0, 0.5, 0.6, 0.7, 0.4, -1.0])
    mean, deviation = policy.posterior()
    noise = torch.randn(200_000, 4, generator=Generator().manual_seed(0), dtype=torch.float64)
    shares = (mean + deviation * noise).argmax(dim=1).bincount(minlength=4) / len(noise)
    # Four standard errors: 4 * sqrt(0.25 / 200000) = 0.0045
    torch.testing.assert_close(policy.probabilities(CONTEXT)[0], shares, atol=0.005, rtol=0)


@pytest.mark.parametrize("policy", [Thompson(2, 5, 4, 0), UCB(2, 5, 4, 0)])
def test_before_rewards_all_bins_are_alike(policy: GaussianBandit) -> None:
    torch.testing.assert_close(
        policy.probabilities(CONTEXT), torch.full((1, 5), 0.2), atol=1e-6, rtol=0
    )


def test_ucb_shares_a_batch_out_until_the_bounds_are_equal() -> None:
    policy = UCB(2, 3, 16, 0, exploration=2.0, discount=1.0)
    see(policy, [0] * 8 + [1] * 4 + [2] * 40, [1.0, 0.0] * 4 + [0.6, 0.2] * 2 + [-2.0, -1.0] * 20)
    mean, deviation = policy.posterior()
    shares = policy.probabilities(CONTEXT)[0].double()
    # As if 16 more choices had been made and had narrowed their bins' deviations
    bounds = mean + 2 * (deviation.pow(-2) + 16 * shares).rsqrt()
    assert bounds[0].item() == pytest.approx(bounds[1].item(), abs=1e-5)
    assert shares[2] == 0
    assert mean[2] + 2 * deviation[2] < bounds[0]
    assert shares[:2].min() > 0.1


def test_the_posterior_follows_rewards_that_change() -> None:
    policy = Thompson(2, 3, 30, 0, discount=0.9)
    generator = Generator().manual_seed(0)
    for step in range(200):
        bins = policy.act(torch.zeros(30, 2), generator, 0.0)
        best = 0 if step < 100 else 2
        rewards = (bins == best) + 0.5 * torch.randn(30, generator=generator)
        policy.learn(torch.zeros(30, 2), bins, rewards, 0.0)
        if step == 99:
            assert policy.probabilities(CONTEXT)[0, 0] > 0.9
    assert policy.probabilities(CONTEXT)[0, 2] > 0.9
