"""The contract of `TimestepPolicy`, over every policy."""

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from rl_policy.bandits import UCB, Thompson
from rl_policy.dqn import DQNPolicy
from rl_policy.protocol import TimestepPolicy
from rl_policy.reinforce import Reinforce
from rl_policy.sb3 import A2CPolicy, PPOPolicy
from rl_policy.simple import Fixed, LinearDecay, Uniform

Build = Callable[..., TimestepPolicy]
CONTEXT, BINS, BATCH = 6, 5, 4

POLICIES: dict[str, Build] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "linear_decay": LinearDecay,
    "reinforce": Reinforce,
    "a2c": A2CPolicy,
    "ppo": PPOPolicy,
    "dqn": DQNPolicy,
    "thompson": Thompson,
    "ucb": UCB,
}
LEARNING = ("reinforce", "a2c", "ppo", "dqn")


@pytest.fixture(params=POLICIES)
def build(request: pytest.FixtureRequest) -> Build:
    return POLICIES[request.param]


def play(policy: TimestepPolicy, steps: range, of: int = 40) -> list[Tensor]:
    """Distributions and choices of these steps, each with contexts and rewards of its own."""
    seen = []
    for step in steps:
        generator = Generator().manual_seed(step)
        context = 3 * torch.randn(BATCH, CONTEXT, generator=generator) + 5
        bins = policy.act(context, generator, step / of)
        rewards = bins.float() - 2 * torch.rand(BATCH, generator=generator)
        policy.learn(context, bins, rewards, step / of)
        seen += [bins, policy.probabilities(context)]
    return seen


def test_policy_fits_the_protocol_and_its_shapes(build: Build) -> None:
    policy = build(CONTEXT, BINS, BATCH, 0)
    assert isinstance(policy, TimestepPolicy)
    context = torch.randn(BATCH, CONTEXT)
    bins = policy.act(context, Generator().manual_seed(0), 0.0)
    assert (bins.shape, bins.dtype) == ((BATCH,), torch.int64)
    assert set(bins.tolist()) <= set(range(BINS))
    metrics = policy.learn(context, bins, torch.randn(BATCH), 0.0)
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    probabilities = policy.probabilities(context)
    assert (probabilities.shape, probabilities.dtype) == ((BATCH, BINS), torch.float32)
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(BATCH))


def test_policy_draws_from_its_probabilities_for_any_number_of_images(build: Build) -> None:
    policy = build(CONTEXT, BINS, BATCH, 0)
    play(policy, range(20))
    generator = Generator().manual_seed(1)
    context = torch.randn(1, CONTEXT, generator=generator).expand(20_000, -1)
    bins = policy.act(context, generator, 0.5)
    shares = torch.bincount(bins, minlength=BINS) / len(bins)
    # Four standard errors of a share: 4 * sqrt(0.25 / 20000) = 0.014
    torch.testing.assert_close(shares, policy.probabilities(context)[0], rtol=0, atol=0.015)


def test_same_seed_and_generators_give_the_same_run(build: Build) -> None:
    first = play(build(CONTEXT, BINS, BATCH, 3), range(20))
    torch.manual_seed(1)  # whatever the global states are
    second = play(build(CONTEXT, BINS, BATCH, 3), range(20))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_policy_resumed_from_a_file_goes_on_to_the_bit(build: Build) -> None:
    policy = build(CONTEXT, BINS, BATCH, 0)
    play(policy, range(21))  # PPO's rollout of 8 steps is part-filled
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    uninterrupted = play(policy, range(21, 40))
    file.seek(0)
    resumed = build(CONTEXT, BINS, BATCH, 0)
    play(resumed, range(3))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(play(resumed, range(21, 40)), uninterrupted, rtol=0, atol=0)


def test_dqn_resumed_with_a_full_buffer_goes_on_to_the_bit() -> None:
    policy, resumed = (DQNPolicy(CONTEXT, BINS, BATCH, 0, replay=8) for _ in range(2))
    play(policy, range(21))
    state = copy.deepcopy(policy.state_dict())
    assert (len(state["buffer"]["rewards"]), state["position"]) == (8, 21 % 8)
    uninterrupted = play(policy, range(21, 40))
    resumed.load_state_dict(state)
    torch.testing.assert_close(play(resumed, range(21, 40)), uninterrupted, rtol=0, atol=0)


def test_policy_leaves_the_global_random_states_alone(build: Build) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    play(build(CONTEXT, BINS, BATCH, 0), range(10))
    assert states() == before


def test_unknown_option_is_refused_with_the_choices(build: Build) -> None:
    with pytest.raises(ValueError, match=f"{build.__name__} has no option 'temperature'"):
        build(CONTEXT, BINS, BATCH, 0, temperature=2)


@pytest.mark.parametrize("name", LEARNING)
def test_misspelt_or_impossible_option_names_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, learning_rat=1e-3)
    with pytest.raises(ValueError, match="learning_rate must be a number above 0, got 'fast'"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, learning_rate="fast")
    with pytest.raises(ValueError, match="hidden must be a whole number at least 1, got 0"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, hidden=0)


def test_fixed_keeps_to_its_bin() -> None:
    policy = Fixed(CONTEXT, BINS, BATCH, 0, bin=3)
    assert policy.act(torch.zeros(2, CONTEXT), Generator(), 0.0).tolist() == [3, 3]
    assert policy.probabilities(torch.zeros(1, CONTEXT)).tolist() == [[0, 0, 0, 1, 0]]
    with pytest.raises(ValueError, match="at most 4, got 5"):
        Fixed(CONTEXT, BINS, BATCH, 0, bin=5)


@pytest.mark.parametrize(
    ("progress", "allowed"),
    [(0.0, 5), (0.19, 5), (0.2, 4), (0.5, 3), (0.79, 2), (0.8, 1), (1.0, 1)],
)
def test_linear_decay_narrows_to_the_lowest_bin(progress: float, allowed: int) -> None:
    policy = LinearDecay(CONTEXT, BINS, BATCH, 0)
    bins = policy.act(torch.zeros(200, CONTEXT), Generator().manual_seed(0), progress)
    assert set(bins.tolist()) == set(range(allowed))
    expected = [1 / allowed] * allowed + [0] * (BINS - allowed)
    torch.testing.assert_close(
        policy.probabilities(torch.zeros(1, CONTEXT)), torch.tensor([expected])
    )


def test_reinforce_takes_the_published_step() -> None:
    policy = Reinforce(2, 3, 2, 0, learning_rate=0.5, entropy_weight=0.1, baseline=False)
    *_, bias = policy.network.parameters()
    context, bins = torch.zeros(2, 2), torch.tensor([0, 2])
    metrics = policy.learn(context, bins, torch.tensor([-1.0, -3.0]), 0.25)
    # All bins alike: log p = -log 3, and the entropy is at its peak, without gradient
    assert metrics["policy_loss"] == pytest.approx(-2 * np.log(3))
    assert metrics["entropy_weight"] == pytest.approx(0.05)
    # d loss / d bias = -mean(reward x (one_hot(bin) - p)) = (0.5, 0, 1.5) - 2/3
    torch.testing.assert_close(bias.grad, torch.tensor([-1 / 6, -2 / 3, 5 / 6]))
    # The first step of Adam is the learning rate against the gradient's sign
    torch.testing.assert_close(bias.detach(), torch.tensor([0.5, 0.5, -0.5]))
    assert policy.learn(context, bins, torch.zeros(2), 0.5)["entropy_weight"] == 0


def test_reinforce_bonus_spreads_the_policy_where_rewards_say_nothing() -> None:
    policy = Reinforce(2, 3, 2, 0, baseline=False)
    *_, bias = policy.network.parameters()
    bias.data[0] = 1.0
    context, bins = torch.zeros(2, 2), torch.tensor([0, 2])
    before = policy.probabilities(context)[0, 0]
    policy.learn(context, bins, torch.zeros(2), 0.0)
    assert policy.probabilities(context)[0, 0] < before


def test_ppo_trains_only_when_its_rollout_is_full() -> None:
    policy = PPOPolicy(CONTEXT, BINS, BATCH, 0, steps=3)
    context, bins = torch.randn(BATCH, CONTEXT), torch.arange(BATCH)
    trained = [bool(policy.learn(context, bins, torch.randn(BATCH), 0.0)) for _ in range(6)]
    assert trained == [False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["a2c", "ppo", "dqn"])
def test_policy_of_sb3_refuses_another_number_of_rewards(name: str) -> None:
    policy = POLICIES[name](CONTEXT, BINS, BATCH, 0)
    with pytest.raises(ValueError, match="built for 4 rewards a step, got 3"):
        policy.learn(torch.zeros(3, CONTEXT), torch.zeros(3).long(), torch.zeros(3), 0.0)


def test_a2c_refuses_a_single_reward_a_step() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        A2CPolicy(CONTEXT, BINS, 1, 0)


@pytest.mark.parametrize("batch", [1, 37, 257])
def test_ppo_takes_any_batch(batch: int) -> None:
    policy = PPOPolicy(CONTEXT, BINS, batch, 0)
    for _ in range(8):
        context, bins = torch.randn(batch, CONTEXT), torch.zeros(batch).long()
        metrics = policy.learn(context, bins, torch.randn(batch), 0.0)
    assert np.isfinite(metrics["loss"])
