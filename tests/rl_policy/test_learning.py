"""Whether the learning policies find what was planted, and nothing where nothing is."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rl_policy.bandits import UCB, Thompson
from rl_policy.dqn import DQNPolicy
from rl_policy.protocol import TimestepPolicy
from rl_policy.reinforce import Reinforce
from rl_policy.sb3 import A2CPolicy, PPOPolicy
from rl_policy.summary import policy_summary

CONTEXT, BINS, BATCH, STEPS = 16, 20, 64, 300


def contexts_of_two_groups(generator: Generator) -> tuple[Tensor, Tensor]:
    """Contexts whose first number tells the group, and each image's best bin: 2 or 7."""
    group = torch.randint(2, (BATCH,), generator=generator)
    context = torch.randn(BATCH, CONTEXT, generator=generator)
    context[:, 0] = 0.3 * context[:, 0] + 4 * group
    return context, torch.where(group == 1, 7, 2)


def train(
    policy: TimestepPolicy, steps: int, *, gain: float, offset: float, groups: bool
) -> tuple[Tensor, Tensor]:
    """Train on rewards offset + gain x (noise + 1 at the best bin), noise of deviation 1.

    Returns:
        The final distributions (B, K), and the best bins (B,).
    """
    generator = Generator().manual_seed(0)
    for step in range(steps):
        context, best = contexts_of_two_groups(generator)
        best = best if groups else torch.full_like(best, 7)
        bins = policy.act(context, generator, step / steps)
        noise = torch.randn(BATCH, generator=generator)
        policy.learn(context, bins, offset + gain * (noise + (bins == best)), step / steps)
    return policy.probabilities(context), best


# Rewards of any offset and scale. Measured over three seeds, least: a2c 0.999, ppo 0.997,
# reinforce 0.987, thompson 0.965, ucb 0.98, dqn 0.94, which explores 0.05 to the end.
@pytest.mark.parametrize(("gain", "offset"), [(1.0, -2.3), (20.0, -100.0)])
@pytest.mark.parametrize("policy", [A2CPolicy, PPOPolicy, Reinforce, Thompson, UCB, DQNPolicy])
def test_policy_puts_90_percent_on_the_planted_bin_of_20_within_300_steps(
    policy: type, gain: float, offset: float
) -> None:
    learner = policy(CONTEXT, BINS, BATCH, 0)
    probabilities, best = train(learner, STEPS, gain=gain, offset=offset, groups=False)
    assert probabilities.gather(1, best[:, None]).mean() >= 0.9


def test_reinforce_without_a_baseline_finds_it_among_rewards_near_minus_two() -> None:
    learner = Reinforce(CONTEXT, BINS, BATCH, 0, baseline=False)
    probabilities, best = train(learner, STEPS, gain=1.0, offset=-2.3, groups=False)
    assert probabilities.gather(1, best[:, None]).mean() >= 0.9


@pytest.mark.parametrize("policy", [A2CPolicy, PPOPolicy, DQNPolicy])
def test_policy_finds_the_best_bin_of_each_group(policy: type) -> None:
    learner = policy(CONTEXT, BINS, BATCH, 0)
    probabilities, best = train(learner, STEPS, gain=20.0, offset=-100.0, groups=True)
    assert probabilities.gather(1, best[:, None]).mean() >= 0.8
    summary = policy_summary(probabilities)
    # Of DQN one choice in twenty is any bin
    assert summary.effective_arms == pytest.approx(2, abs=1.5 if policy is DQNPolicy else 0.5)
    assert summary.image_entropy < 0.5 < summary.entropy


# Closed of the gap between uniform and the best bin, least of three seeds: a2c 0.98, ppo 0.97,
# reinforce 0.98; with contexts 22 times as long 0.78, 0.64 and 0.95.
@pytest.mark.parametrize("policy", [A2CPolicy, PPOPolicy, Reinforce])
def test_long_contexts_that_tell_nothing_do_not_hide_which_bin_is_best(policy: type) -> None:
    size, bins, steps, batch = 512, 10, 600, 32
    images = Generator().manual_seed(100)
    contexts, hardness = (
        torch.randn(1000, size, generator=images),
        torch.randn(1000, generator=images),
    )
    worth = -0.1 * (torch.arange(bins) - 3).abs().clamp(max=3)
    learner = policy(size, bins, batch, 0)
    generator = Generator().manual_seed(0)
    for step in range(steps):
        drawn = torch.randint(1000, (batch,), generator=generator)
        chosen = learner.act(contexts[drawn], generator, step / steps)
        noise = hardness[drawn] + 0.5 * torch.randn(batch, generator=generator)
        learner.learn(contexts[drawn], chosen, worth[chosen] + noise, step / steps)
    earned = (learner.probabilities(contexts) @ worth).mean()
    assert 1 - earned / worth.mean() >= 0.96


@pytest.mark.parametrize("policy", [A2CPolicy, PPOPolicy, Reinforce, Thompson])
def test_policy_stays_spread_where_no_bin_is_better(policy: type) -> None:
    learner = policy(CONTEXT, BINS, BATCH, 0)
    generator = Generator().manual_seed(0)
    for step in range(500):
        context, _ = contexts_of_two_groups(generator)
        bins = learner.act(context, generator, step / 500)
        learner.learn(context, bins, torch.randn(BATCH, generator=generator), step / 500)
    # DQN and UCB are not here: what is ahead by chance gets most of their choices, for a while
    assert policy_summary(learner.probabilities(context)).entropy > 0.9 * math.log(BINS)
