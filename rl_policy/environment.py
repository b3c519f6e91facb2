"""Choosing timesteps as a gymnasium environment, for any agent from outside.

Importing this module registers `distill/TimestepSelection-v0`:

    table = ReplayTable(contexts=contexts, rewards=rewards)
    environment = gymnasium.make("distill/TimestepSelection-v0", source=table)
    stable_baselines3.A2C("MlpPolicy", environment, gamma=0.0).learn(10_000)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

ENVIRONMENT_ID = "distill/TimestepSelection-v0"


class RewardSource(Protocol):
    """Images with contexts, and what each choice of a timestep bin for them earns.

    Live, `earn` does one distillation step on these images at these bins, so that one step of
    the environment is one step of distillation. Replayed, both methods look the answer up. Images
    go by their index, 0..images-1, and come in batches, here of one.
    """

    @property
    def images(self) -> int: ...

    @property
    def context_size(self) -> int: ...

    @property
    def bins(self) -> int: ...

    def observe(self, images: NDArray[np.int64]) -> NDArray[np.float32]:
        """Contexts of images (B,) -> (B, D) float32, finite."""
        ...

    def earn(self, images: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.float32]:
        """What these bins (B,) earn for these images (B,) -> (B,) float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReplayTable:
    """A recorded table of the reward of every bin for every image.

    Raises:
        ValueError: the two tables do not fit each other, or hold no image or no bin.
    """

    contexts: NDArray[np.float32]
    """(N, D): the context of each image."""
    rewards: NDArray[np.float32]
    """(N, K): the reward of each bin for it."""

    def __post_init__(self) -> None:
        contexts, rewards = self.contexts.shape, self.rewards.shape
        if len(contexts) != 2 or len(rewards) != 2 or contexts[0] != rewards[0] or 0 in rewards:
            raise ValueError(
                f"a replay table needs contexts (N, D) and rewards (N, K) of the same N images, "
                f"got {contexts} and {rewards}"
            )

    @property
    def images(self) -> int:
        return len(self.contexts)

    @property
    def context_size(self) -> int:
        return int(self.contexts.shape[1])

    @property
    def bins(self) -> int:
        return int(self.rewards.shape[1])

    def observe(self, images: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.contexts[images].astype(np.float32)

    def earn(self, images: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.rewards[images, bins].astype(np.float32)


class TimestepEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A contextual bandit: see one image's context, choose a bin, get the reward; one step long.

    Observation: the context, Box (D,) float32. Action: the bin, Discrete(K). `reset` draws the
    image uniformly; `info["image"]` tells its index. The observation after the step is the same
    context again, for nothing follows from the choice.
    """

    def __init__(self, source: RewardSource) -> None:
        limit = np.finfo(np.float32).max  # any finite context: the checkers mistrust infinity
        self.source = source
        self.observation_space = spaces.Box(-limit, limit, (source.context_size,), np.float32)
        self.action_space = spaces.Discrete(source.bins)
        self._image: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._image = int(self.np_random.integers(self.source.images))
        self._context = self.source.observe(np.array([self._image]))[0]
        return self._context.copy(), {"image": self._image}

    def step(
        self, action: np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Earn the reward of the bin `action` for the image.

        Raises:
            gymnasium.error.ResetNeeded: the image has had its choice; `reset` draws the next.
        """
        if self._image is None:
            raise gymnasium.error.ResetNeeded("an episode is one step long: call reset() first")
        image, self._image = self._image, None
        reward = self.source.earn(np.array([image]), np.array([action]))[0]
        return self._context.copy(), float(reward), True, False, {"image": image}


gymnasium.register(id=ENVIRONMENT_ID, entry_point=f"{__name__}:TimestepEnv")
