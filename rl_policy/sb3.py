"""Actor-critic policies of stable-baselines3, with one environment step per distillation step.

The library supplies the network, the rollout buffer and the update, through public attributes; the
training loop is the caller's. With gamma 0 and episodes of one step, reinforcement learning becomes
a bandit, and the advantage is the reward minus the critic's estimate.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Generator, Tensor

from rl_policy.drawing import draw, of_finite_logits
from rl_policy.environment import TimestepEnv
from rl_policy.options import WIDEST, OptionError, check_range
from rl_policy.scaling import ContextScale, RunningScale
from rl_policy.seeding import seeded_numpy, seeded_torch
from rl_policy.table import ReplayTable

_BUFFERED = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs")


class ActorCritic:
    """Base of A2C and PPO: choose, collect, and train when the rollout buffer is full.

    Contexts and rewards are standardised by running means and variances. `learn` treats the images
    of one step as simultaneous steps of as many environments.
    """

    def __init__(
        self, model: A2C | PPO, context_size: int, seed: int, entropy: tuple[float, float, float]
    ) -> None:
        self.model = model
        self.seed = seed
        self.entropy_weight, self.entropy_end, self.entropy_until = entropy
        self.updates = 0
        self.context_scale = ContextScale(context_size)
        self.reward_scale = RunningScale(floor=0)
        model.set_logger(Logger(folder=None, output_formats=[]))

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return draw(self.probabilities(context), generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`. Returns nothing while the buffer is filling.

        Raises:
            ValueError: the number of images is not `batch`.
        """
        batch = self.model.n_envs
        if len(context) != batch:
            raise ValueError(
                f"{type(self).__name__} was built for {batch} rewards per step, got {len(context)}"
            )
        buffer = self.model.rollout_buffer
        self.reward_scale.update(rewards)
        with torch.no_grad():
            observations = self.context_scale(context)
            values, log_probabilities, _ = self.model.policy.evaluate_actions(observations, bins)
        buffer.add(
            observations.numpy(),
            bins.numpy(),
            self.reward_scale(rewards).numpy(),
            np.ones(batch),
            values,
            log_probabilities,
        )
        # After the contexts are used: `act` saw them on the old scale
        self.context_scale.update(context)
        return self._train(progress) if buffer.full else {}

    def _train(self, progress: float) -> dict[str, float]:
        extra = self.entropy_weight - self.entropy_end
        remaining = max(0.0, 1 - progress / self.entropy_until)
        self.model.ent_coef = self.entropy_end + remaining * extra
        batch = self.model.n_envs
        self.model.rollout_buffer.compute_returns_and_advantage(torch.zeros(batch), np.ones(batch))
        with seeded_numpy(self.seed, self.updates), of_finite_logits():
            self.model.train()
        self.updates += 1
        self.model.rollout_buffer.reset()
        recorded = self.model.logger.name_to_value
        metrics = {name.removeprefix("train/"): float(value) for name, value in recorded.items()}
        metrics.pop("n_updates", None)  # counted anew after a resume
        # The explained variance is NaN when all returns are alike
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    @torch.no_grad()
    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        with of_finite_logits():
            distribution = self.model.policy.get_distribution(self.context_scale(context))
        assert isinstance(distribution, CategoricalDistribution)
        probabilities: Tensor = distribution.distribution.probs
        return probabilities

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        buffer = self.model.rollout_buffer
        return {
            "network": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "context_scale": self.context_scale.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
            "updates": self.updates,
            "buffer": {
                name: torch.from_numpy(getattr(buffer, name)[: buffer.pos].copy())
                for name in _BUFFERED
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.model.policy.load_state_dict(state["network"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        self.context_scale.load_state_dict(state["context_scale"])
        self.reward_scale.load_state_dict(state["reward_scale"])
        self.updates = state["updates"]
        buffer = self.model.rollout_buffer
        buffer.reset()
        buffer.pos = len(state["buffer"]["rewards"])
        for name in _BUFFERED:
            getattr(buffer, name)[: buffer.pos] = state["buffer"][name].numpy()


class A2CPolicy(ActorCritic):
    """Advantage actor-critic (Mnih et al. 2016): one update per step, on that step's images.

    Args:
        learning_rate: of Adam.
        entropy_weight: of the entropy bonus at the start. Large, because a bin has no value for
            a class that the reward head has not yet seen at it.
        entropy_end: final weight of the entropy bonus, reached linearly.
        entropy_until: share of the steps with a teacher after which it is reached.
        hidden: width of the two hidden layers, of the actor and of the critic.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        learning_rate: float = 1.5e-3,
        entropy_weight: float = 0.2,
        entropy_end: float = 0.01,
        entropy_until: float = 0.7,
        hidden: int = 64,
    ) -> None:
        entropy = entropy_weight, entropy_end, entropy_until
        _check_common(learning_rate, hidden, *entropy)
        if batch < 2:  # advantages are normalised
            raise ValueError(f"A2CPolicy needs at least 2 rewarded images per step, got {batch}")
        with seeded_torch(seed):
            model = A2C(
                "MlpPolicy",
                environments(context_size, bins, batch),
                learning_rate=learning_rate,
                n_steps=1,
                gamma=0.0,
                ent_coef=entropy_weight,
                normalize_advantage=True,
                use_rms_prop=False,
                policy_kwargs={"net_arch": [hidden, hidden]},
                device="cpu",
            )
        super().__init__(model, context_size, seed, entropy)


class PPOPolicy(ActorCritic):
    """Proximal policy optimisation (Schulman et al. 2017): an update every few steps.

    Args:
        learning_rate: of Adam.
        entropy_weight: of the entropy bonus at the start. Large, because a bin has no value for
            a class that the reward head has not yet seen at it.
        entropy_end: final weight of the entropy bonus, reached linearly.
        entropy_until: share of the steps with a teacher after which it is reached.
        hidden: width of the two hidden layers, of the actor and of the critic.
        steps: steps collected before an update.
        minibatch: images in each of its gradient steps, at most.
        epochs: passes over the collected steps in an update.
        clip_range: how far a bin's probability may move in an update, as a ratio.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        learning_rate: float = 2e-3,
        entropy_weight: float = 0.1,
        entropy_end: float = 0.01,
        entropy_until: float = 0.5,
        hidden: int = 64,
        steps: int = 8,
        minibatch: int = 256,
        epochs: int = 4,
        clip_range: float = 0.2,
    ) -> None:
        entropy = entropy_weight, entropy_end, entropy_until
        _check_common(learning_rate, hidden, *entropy)
        check_range("steps", steps, least=1, most=10**6, whole=True)
        check_range("minibatch", minibatch, least=2, most=10**6, whole=True)
        check_range("epochs", epochs, least=1, most=10**4, whole=True)
        check_range("clip_range", clip_range, above=0)
        if steps * batch < 2:
            raise OptionError("steps must be at least 2 where a step has a single rewarded image")
        with seeded_torch(seed), warnings.catch_warnings():
            # A smaller last minibatch does no harm
            warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
            model = PPO(
                "MlpPolicy",
                environments(context_size, bins, batch),
                learning_rate=learning_rate,
                n_steps=steps,
                batch_size=min(minibatch, steps * batch),
                n_epochs=epochs,
                gamma=0.0,
                clip_range=clip_range,
                ent_coef=entropy_weight,
                policy_kwargs={"net_arch": [hidden, hidden]},
                device="cpu",
            )
        super().__init__(model, context_size, seed, entropy)


def _check_common(
    learning_rate: float,
    hidden: int,
    entropy_weight: float,
    entropy_end: float,
    entropy_until: float,
) -> None:
    check_range("learning_rate", learning_rate, above=0)
    check_range("entropy_weight", entropy_weight, least=0)
    check_range("entropy_end", entropy_end, least=0)
    check_range("entropy_until", entropy_until, above=0, most=1)
    check_range("hidden", hidden, least=1, most=WIDEST, whole=True)


def environments(context_size: int, bins: int, batch: int) -> DummyVecEnv:
    """Environments that give the library their spaces and number, and are never stepped."""
    blank = ReplayTable(
        contexts=np.zeros((1, context_size), np.float32), rewards=np.zeros((1, bins), np.float32)
    )
    return DummyVecEnv([lambda: TimestepEnv(blank)] * batch)
