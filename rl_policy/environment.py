"""Choosing timesteps as a gymnasium environment, for any agent from outside.

Importing `rl_policy` registers `distill/TimestepSelection-v0`, which replays a recorded table:

    import gymnasium, rl_policy, stable_baselines3

    environment = gymnasium.make("distill/TimestepSelection-v0", source="table.safetensors")
    stable_baselines3.A2C("MlpPolicy", environment, gamma=0.0).learn(10_000)

`gymnasium.make_vec("distill/TimestepSelection-v0", num_envs=64, source=...)` handles a whole batch
at once.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rl_policy.table import ReplayTable


class RewardSource(Protocol):
    """Images with contexts, and the reward of each choice of a timestep bin.

    A live source does one distillation step on the images at the given bins in `earn`, so that one
    step of the environment is one step of distillation. A recorded one looks contexts and rewards
    up. Images are given by their index, 0..images-1, in batches.
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
        """Rewards of bins (B,) for images (B,) -> (B,) float32."""
        ...


Source = RewardSource | str | os.PathLike[str]
"""Source of rewards; a path is that of a `ReplayTable`."""


Contexts = gymnasium.Space[NDArray[np.float32]]


def _open(source: Source) -> tuple[RewardSource, Contexts, spaces.Discrete]:
    """Read the source, and build the spaces of one context and one choice."""
    if isinstance(source, str | os.PathLike):
        source = ReplayTable.read(source)
    limit = np.finfo(np.float32).max  # any finite context: the checkers mistrust infinity
    contexts: Any = spaces.Box(-limit, limit, (source.context_size,), np.float32)
    return source, contexts, spaces.Discrete(source.bins)


class TimestepEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A contextual bandit: see one image's context, choose a bin, get the reward.

    Observation: the context, Box (D,) float32. Action: the bin, Discrete(K). `reset` draws the
    image uniformly; `info["image"]` has its index. An episode is one step long, and the observation
    after it is the same context.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.observation_space, self.action_space = _open(source)
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
            gymnasium.error.ResetNeeded: the episode is over; `reset` draws the next image.
            gymnasium.error.InvalidAction: there is no such bin.
        """
        if self._image is None:
            raise gymnasium.error.ResetNeeded("an episode is one step long: call reset() first")
        _check_bins(np.asarray(action)[None], 1, self.source.bins)
        image, self._image = self._image, None
        reward = self.source.earn(np.array([image]), np.array([action]))[0]
        return self._context.copy(), float(reward), True, False, {"image": image}


class TimestepVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """A batch of `TimestepEnv`, with one look-up (or live step of distillation) per step.

    Every step ends all episodes and draws the next images: `step` returns their observations, and
    the last ones of the ended episodes are in `info["final_obs"]`, as gymnasium defines it.

    Args:
        num_envs: B.
        source: as for `TimestepEnv`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (as in the base class)

    def __init__(self, num_envs: int, source: Source) -> None:
        self.num_envs = num_envs
        self.source, self.single_observation_space, self.single_action_space = _open(source)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._images: NDArray[np.int64] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._images = self.np_random.integers(self.source.images, size=self.num_envs)
        self._contexts = self.source.observe(self._images)
        return self._contexts.copy(), {"image": self._images}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Earn the rewards of the bins `actions` (B,), and draw the next images.

        Raises:
            gymnasium.error.ResetNeeded: `reset` was not called yet.
            gymnasium.error.InvalidAction: the actions are not B bins.
        """
        if self._images is None:
            raise gymnasium.error.ResetNeeded("call reset() first")
        _check_bins(np.asarray(actions), self.num_envs, self.source.bins)
        rewards = self.source.earn(self._images, np.asarray(actions))
        ended, images = self._contexts, self._images
        contexts, info = self.reset()
        over = np.ones(self.num_envs, dtype=np.bool_)
        info |= {
            "final_obs": ended,
            "_final_obs": over,
            "final_info": {"image": images, "_image": over},
            "_final_info": over,
        }
        return contexts, rewards, over, np.zeros_like(over), info


def _check_bins(actions: NDArray[Any], count: int, bins: int) -> None:
    whole = np.issubdtype(actions.dtype, np.integer)
    if not whole or actions.shape != (count,) or (actions < 0).any() or (actions >= bins).any():
        raise gymnasium.error.InvalidAction(
            f"expected {count} whole numbers from 0 to {bins - 1} as actions, got {actions}"
        )
