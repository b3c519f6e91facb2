"""Value learning of stable-baselines3: it predicts each bin's reward and picks the best bin."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from torch import Generator, Tensor

from rl_policy.drawing import check_finite, draw
from rl_policy.options import WIDEST, check_range
from rl_policy.sb3 import environments
from rl_policy.scaling import ContextScale, RunningScale
from rl_policy.seeding import seeded_numpy, seeded_torch


class DQNPolicy:
    """Deep Q-network (Mnih et al. 2015) on a replay buffer of the last steps, with gamma 0.

    For a bandit it reduces to a regression of the reward, standardised by a running mean and scale,
    on context and bin. It chooses the bin with the largest value, or with a small probability any
    bin; images get different bins only if their values differ.

    Args:
        learning_rate: of Adam.
        exploration: final probability of a random bin; it falls linearly from 1.
        exploration_until: share of the steps with a teacher after which `exploration` is reached.
        hidden: width of the two hidden layers.
        replay: number of steps stored; few, because rewards drift as the reward head learns.
        minibatch: images per gradient step.
        gradient_steps: number of gradient steps after each step.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        learning_rate: float = 1e-3,
        exploration: float = 0.05,
        exploration_until: float = 0.5,
        hidden: int = 64,
        replay: int = 64,
        minibatch: int = 256,
        gradient_steps: int = 1,
    ) -> None:
        check_range("learning_rate", learning_rate, above=0)
        check_range("exploration", exploration, least=0, most=1)
        check_range("exploration_until", exploration_until, above=0, most=1)
        for name, value, most in (
            ("hidden", hidden, WIDEST),
            ("replay", replay, 10**7),
            ("minibatch", minibatch, 10**6),
            ("gradient_steps", gradient_steps, 10**4),
        ):
            check_range(name, value, least=1, most=most, whole=True)
        self.bins, self.batch, self.seed, self.updates = bins, batch, seed, 0
        self.minibatch, self.gradient_steps = minibatch, gradient_steps
        self.exploration, self.exploration_until, self.rate = exploration, exploration_until, 1.0
        self.context_scale, self.reward_scale = ContextScale(context_size), RunningScale(floor=0)
        with seeded_torch(seed):
            self.model = DQN(
                "MlpPolicy",
                environments(context_size, bins, batch),
                learning_rate=learning_rate,
                buffer_size=replay * batch,
                target_update_interval=batch,  # without a future nothing reads the target network
                gamma=0.0,
                policy_kwargs={"net_arch": [hidden, hidden]},
                device="cpu",
            )
        self.model.set_logger(Logger(folder=None, output_formats=[]))

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        fallen = min(1.0, progress / self.exploration_until)
        self.rate = 1 - (1 - self.exploration) * fallen
        return draw(self.probabilities(context), generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`.

        Raises:
            ValueError: the number of images is not `batch`.
        """
        if len(context) != self.batch:
            raise ValueError(
                f"DQNPolicy was built for {self.batch} rewards per step, got {len(context)}"
            )
        self.reward_scale.update(rewards)
        self._add(self.context_scale(context), bins, self.reward_scale(rewards))
        self.context_scale.update(context)
        with seeded_numpy(self.seed, self.updates):
            self.model.train(self.gradient_steps, self.minibatch)
        self.updates += 1
        loss = float(self.model.logger.name_to_value["train/loss"])
        return {"loss": loss, "exploration": self.rate}

    def _add(self, observations: Tensor, bins: Tensor, rewards: Tensor) -> None:
        seen = observations.numpy()
        over = np.ones(self.batch)
        self._buffer.add(seen, seen, bins.numpy(), rewards.numpy(), over, [{}] * self.batch)

    @property
    def _buffer(self) -> ReplayBuffer:
        assert self.model.replay_buffer is not None
        return self.model.replay_buffer

    @torch.no_grad()
    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        values = self.model.q_net(self.context_scale(context))
        check_finite(values)
        best = values.argmax(dim=1, keepdim=True)
        spread = torch.full((len(context), self.bins), self.rate / self.bins)
        return spread.scatter_add_(1, best, torch.full(best.shape, 1 - self.rate))

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        buffer = self._buffer
        filled = buffer.buffer_size if buffer.full else buffer.pos
        return {
            "network": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "context_scale": self.context_scale.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
            "updates": self.updates,
            "rate": self.rate,
            "position": buffer.pos,
            "buffer": {
                name: torch.from_numpy(getattr(buffer, name)[:filled].copy())
                for name in ("observations", "actions", "rewards")
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.model.policy.load_state_dict(state["network"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        self.context_scale.load_state_dict(state["context_scale"])
        self.reward_scale.load_state_dict(state["reward_scale"])
        self.updates, self.rate = state["updates"], state["rate"]
        self._buffer.reset()
        for row in zip(*state["buffer"].values(), strict=True):
            self._add(*row)
        self._buffer.pos = state["position"]
