"""The contract of `TimestepPolicy`, over every policy."""

import copy
import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from rl_policy.bandits import UCB, Thompson
from rl_policy.dqn import DQNPolicy
from rl_policy.options import OptionError, create
from rl_policy.protocol import MixingPolicy, TimestepPolicy
from rl_policy.reinforce import Reinforce
from rl_policy.sb3 import A2CPolicy, PPOPolicy
from rl_policy.simple import Fixed, Grid, LinearDecay, Uniform
from rl_policy.soft_mix import SoftMix
from rl_policy.table import ReplayTable

Build = Callable[..., Any]
CONTEXT, BINS, BATCH = 12, 5, 4  # contexts may be images of 2 px
PUBLISHED: dict[str, Any] = {
    "network": "conv",
    "image_size": 2,
    "optimizer": "sgd",
    "rate_drops": [0.5],
    "baseline": False,
}

POLICIES: dict[str, Build] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "linear_decay": LinearDecay,
    "reinforce": Reinforce,
    "reinforce_published": partial(Reinforce, **PUBLISHED),
    "a2c": A2CPolicy,
    "ppo": PPOPolicy,
    "dqn": DQNPolicy,
    "thompson": Thompson,
    "ucb": UCB,
    "grid": Grid,
    "soft_mix": SoftMix,
}
LEARNING = ("reinforce", "a2c", "ppo", "dqn")
TIMESTEPS = 100 * torch.arange(BINS)


def write_table(path: Path, best: int) -> str:
    """A table of four timesteps, of which `best` earns most on average."""
    timesteps = np.unique([best, 1, 20, 499])
    rewards = np.zeros((2, 4), np.float32)
    rewards[:, (timesteps == 20).argmax()] = 1, 2
    rewards[0, (timesteps == best).argmax()] = 4
    contexts = np.zeros((2, CONTEXT), np.float32)
    table = ReplayTable(contexts=contexts, rewards=rewards, timesteps=timesteps)
    path.write_bytes(table.to_bytes())
    return str(path)


def builder(name: str, folder: Path) -> Build:
    """The policy without further options."""
    build: Any = POLICIES[name]
    if name == "grid":
        build = partial(Grid, timesteps=TIMESTEPS, table=write_table(folder / "table", 320))
    return build  # type: ignore[no-any-return]


@pytest.fixture(params=POLICIES)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    return builder(request.param, tmp_path)


@pytest.fixture(params=[name for name in POLICIES if name != "soft_mix"])
def choosing(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    return builder(request.param, tmp_path)


def play(policy: Any, steps: range, of: int = 40) -> list[Tensor]:
    """Distributions and choices of these steps, each with contexts and rewards of its own."""
    seen = []
    for step in steps:
        generator = Generator().manual_seed(step)
        context = 3 * torch.randn(BATCH, CONTEXT, generator=generator) + 5
        if isinstance(policy, MixingPolicy):
            weights = policy.mix(context, step / of)
            gradients = torch.randn(BATCH, BINS, generator=generator)
            policy.learn(context, weights, gradients, step / of)
            seen += [weights, policy.probabilities(context)]
            continue
        bins = policy.act(context, generator, step / of)
        rewards = bins.float() - 2 * torch.rand(BATCH, generator=generator)
        policy.learn(context, bins, rewards, step / of)
        seen += [bins, policy.probabilities(context)]
    return seen


def test_policy_fits_the_protocol_and_its_shapes(choosing: Build) -> None:
    policy = choosing(CONTEXT, BINS, BATCH, 0)
    assert not isinstance(policy, MixingPolicy)
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


def test_policy_draws_from_its_probabilities_for_any_number_of_images(choosing: Build) -> None:
    policy = choosing(CONTEXT, BINS, BATCH, 0)
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
    networks = resumed.state_dict()["network"], policy.state_dict()["network"]
    torch.testing.assert_close(*networks, rtol=0, atol=0)  # its choices hardly tell


def test_policy_leaves_the_global_random_states_alone(build: Build) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    play(build(CONTEXT, BINS, BATCH, 0), range(10))
    assert states() == before


@pytest.mark.parametrize("policy", POLICIES.values())
def test_unknown_option_is_refused_with_the_choices(policy: Any) -> None:
    policy = getattr(policy, "func", policy)
    with pytest.raises(OptionError, match=f"temperature is not an option of {policy.__name__}; "):
        create(policy, CONTEXT, TIMESTEPS, BATCH, 0, {"temperature": 2})


@pytest.mark.parametrize("name", LEARNING)
def test_misspelt_or_impossible_option_names_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        create(POLICIES[name], CONTEXT, TIMESTEPS, BATCH, 0, {"learning_rat": 1e-3})
    with pytest.raises(ValueError, match="learning_rate must be a number above 0, got 'fast'"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, learning_rate="fast")
    with pytest.raises(ValueError, match="hidden must be a whole number at least 1 and at most"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, hidden=0)
    with pytest.raises(ValueError, match="learning_rate must be a number above 0, got inf"):
        POLICIES[name](CONTEXT, BINS, BATCH, 0, learning_rate=float("inf"))


def test_a_word_is_no_flag() -> None:
    with pytest.raises(ValueError, match="baseline must be true or false, got 'no'"):
        Reinforce(CONTEXT, BINS, BATCH, 0, baseline="no")


def test_fixed_keeps_to_its_bin() -> None:
    policy = Fixed(CONTEXT, BINS, BATCH, 0, bin=3)
    assert policy.act(torch.zeros(2, CONTEXT), Generator(), 0.0).tolist() == [3, 3]
    assert policy.probabilities(torch.zeros(1, CONTEXT)).tolist() == [[0, 0, 0, 1, 0]]
    with pytest.raises(ValueError, match="at most 4, got 5"):
        Fixed(CONTEXT, BINS, BATCH, 0, bin=5)


@pytest.mark.parametrize(("best", "bin"), [(320, 3), (0, 0), (999, 4), (149, 1), (151, 2)])
def test_grid_keeps_to_the_bin_nearest_to_the_best_timestep_of_a_table(
    tmp_path: Path, best: int, bin: int
) -> None:
    options = {"table": write_table(tmp_path / "table", best)}
    policy = create(Grid, CONTEXT, TIMESTEPS, BATCH, 0, options)
    assert policy.act(torch.zeros(2, CONTEXT), Generator(), 0.0).tolist() == [bin, bin]
    # A table that has changed since does not change a run that goes on
    other = create(
        Grid, CONTEXT, TIMESTEPS, BATCH, 0, {"table": write_table(tmp_path / "table", 9)}
    )
    other.load_state_dict(policy.state_dict())
    assert other.act(torch.zeros(1, CONTEXT), Generator(), 0.0).tolist() == [bin]


def test_grid_without_a_usable_table_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises((ValueError, OSError)) as raised:
            create(Grid, CONTEXT, TIMESTEPS, BATCH, 0, options)
        return str(raised.value)

    assert "table must be the recorded rewards of a probe: " in refused()
    assert "No such file" in refused(table=str(tmp_path / "none"))
    (tmp_path / "foreign").write_text("{}")
    assert "is damaged or not a safetensors file" in refused(table=str(tmp_path / "foreign"))
    assert "timesteps is not an option" in refused(timesteps=[1])
    assert refused(tabel="x") == "tabel is not an option of Grid; did you mean 'table'?"


def test_soft_mix_goes_against_the_gradient_of_its_weights() -> None:
    policy = SoftMix(CONTEXT, 3, BATCH, 0, learning_rate=0.1)
    context = torch.randn(2, CONTEXT)
    weights = policy.mix(context, 0.0)
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
    gradients = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 2.0]])
    policy.learn(context, weights, gradients, 0.0)
    # Means 3, 1, 1; through the softmax (3 - 5/3, 1 - 5/3, 1 - 5/3) / 3; Adam's first step is its
    # rate against the sign
    torch.testing.assert_close(policy.logits.detach(), torch.tensor([-0.1, 0.1, 0.1]))
    expected = torch.tensor([4 / 9, -2 / 9, -2 / 9])
    torch.testing.assert_close(policy.logits.grad, expected)
    torch.testing.assert_close(policy.mix(context, 0.0)[0], policy.logits.detach().softmax(0))


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


def test_reinforce_by_sgd_has_momentum_decay_and_drops_of_its_rate() -> None:
    options = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.25}
    policy = Reinforce(
        2, 3, 2, 0, **options, rate_drops=[0.25, 0.5], entropy_weight=0.0, baseline=False
    )
    *_, bias = policy.network.parameters()
    context, bins = torch.zeros(2, 2), torch.tensor([0, 2])
    policy.learn(context, bins, torch.tensor([-1.0, -3.0]), 0.25)  # not after a quarter yet
    gradient = torch.tensor([-1 / 6, -2 / 3, 5 / 6])  # as above
    after = -0.5 * gradient
    torch.testing.assert_close(bias.detach(), after)
    policy.learn(context, bins, torch.zeros(2), 0.26)
    after = after - 0.05 * (0.9 * gradient + 0.25 * after)
    torch.testing.assert_close(bias.detach(), after)
    policy.learn(context, bins, torch.zeros(2), 0.51)
    assert policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_reinforce_convolves_images_of_any_size(size: int) -> None:
    policy = create(Reinforce, 3 * size**2, TIMESTEPS, BATCH, 0, {"network": "conv"}, size)
    images = torch.rand(BATCH, 3, size, size)
    contexts, bins = images.flatten(1), torch.arange(BATCH)
    for _ in range(3):
        policy.learn(contexts, bins, torch.arange(4.0), 0.5)
    assert all(bool((p.grad != 0).any()) for p in policy.network.parameters())
    probabilities = policy.probabilities(contexts)
    assert probabilities.shape == (BATCH, BINS)
    other_channels = images[:, [1, 2, 0]].flatten(1)
    assert not torch.equal(policy.probabilities(other_channels), probabilities)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"network": "conv"}, r"network=conv reads only images; set policy\.context=image"),
        ({"network": "cnn"}, "network must be one of mlp, conv, got 'cnn'"),
        ({"optimizer": "adamw"}, "optimizer must be one of adam, sgd, got 'adamw'"),
        ({"rate_drops": 0.5}, "rate_drops must be a list of shares of training, got 0.5"),
        ({"rate_drops": [0.5, 100]}, "rate_drops must be a number above 0 and at most 1, got 100"),
        ({"weight_decay": -1}, "weight_decay must be a number at least 0, got -1"),
        ({"image_size": 8}, "image_size is not an option: the run itself sets it"),
        ({"bins": 8}, "bins is not an option: the run itself sets it"),
        (
            {"image_siz": 8},
            "image_siz is not an option of Reinforce; choose from network, hidden, ",
        ),
    ],
)
def test_reinforce_refuses_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        create(Reinforce, CONTEXT, TIMESTEPS, BATCH, 0, options)


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
    with pytest.raises(ValueError, match="built for 4 rewards per step, got 3"):
        policy.learn(torch.zeros(3, CONTEXT), torch.zeros(3).long(), torch.zeros(3), 0.0)


def test_a2c_refuses_a_single_reward_a_step() -> None:
    with pytest.raises(ValueError, match="at least 2 rewarded images per step, got 1"):
        A2CPolicy(CONTEXT, BINS, 1, 0)


@pytest.mark.parametrize("batch", [1, 37, 257])
def test_ppo_takes_any_batch(batch: int) -> None:
    policy = PPOPolicy(CONTEXT, BINS, batch, 0)
    for _ in range(8):
        context, bins = torch.randn(batch, CONTEXT), torch.zeros(batch).long()
        metrics = policy.learn(context, bins, torch.randn(batch), 0.0)
    assert np.isfinite(metrics["loss"])
