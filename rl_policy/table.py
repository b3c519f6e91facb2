"""A recorded table of rewards, image x timestep, to try policies on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

COLUMNS = ("rewards", "timesteps", "contexts")


@dataclass(frozen=True, kw_only=True)
class ReplayTable:
    """The reward of every bin for every image, and each image's context.

    Raises:
        ValueError: the shapes do not fit each other or have a size of 0, a number is not finite, or
            the timesteps do not increase from 0 or more.
    """

    contexts: NDArray[np.float32]
    """(N, D): the context of each image."""
    rewards: NDArray[np.float32]
    """(N, K): the reward of each bin for each image."""
    timesteps: NDArray[np.int64] | None = None
    """(K,): the timestep of each bin, or None if unknown."""

    def __post_init__(self) -> None:
        contexts, rewards = self.contexts.shape, self.rewards.shape
        matrices = len(contexts) == len(rewards) == 2 and 0 not in contexts + rewards
        if not matrices or contexts[0] != rewards[0]:
            raise ValueError(
                f"a replay table needs contexts (N, D) and rewards (N, K) of the same N images, "
                f"got shapes {contexts} and {rewards}"
            )
        if self.timesteps is not None and self.timesteps.shape != rewards[1:]:
            raise ValueError(
                f"a replay table needs one timestep per bin, shape ({rewards[1]},), got "
                f"{self.timesteps.shape}"
            )
        if self.timesteps is not None and not (np.diff(self.timesteps, prepend=-1) > 0).all():
            raise ValueError("the timesteps of a replay table must be increasing, from 0 or more")
        for name in ("contexts", "rewards"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"the {name} of a replay table must be finite")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ReplayTable:
        """Read a safetensors file with `rewards`, `timesteps` and `contexts`.

        Raises:
            ValueError: it is not such a file; the message names it.
            OSError: it is missing, or a folder.
        """
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder; name a probe's table.safetensors")
        try:
            arrays = load_file(path)
        except (SafetensorError, TypeError) as error:  # numpy has no bfloat16
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        if missing := [name for name in COLUMNS if name not in arrays]:
            raise ValueError(
                f"{path} has no {' and no '.join(missing)}; a replay table needs "
                f"{', '.join(COLUMNS)}"
            )
        if wrong := [name for name in COLUMNS if arrays[name].dtype.kind not in "fiu"]:
            raise ValueError(
                f"{path}: {wrong[0]} must be real numbers, got {arrays[wrong[0]].dtype}"
            )
        if (arrays["timesteps"] != np.floor(arrays["timesteps"])).any():  # NaN too
            raise ValueError(f"{path}: the timesteps of a replay table must be whole numbers")
        try:
            return cls(
                rewards=arrays["rewards"].astype(np.float32),
                timesteps=arrays["timesteps"].astype(np.int64),
                contexts=arrays["contexts"].astype(np.float32),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_bytes(self) -> bytes:
        """The content of a file for `read`; bins without timesteps are numbered."""
        timesteps = np.arange(self.bins) if self.timesteps is None else self.timesteps
        arrays = {"rewards": self.rewards, "timesteps": timesteps, "contexts": self.contexts}
        return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

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
        """See `RewardSource.observe`."""
        return self.contexts[images].astype(np.float32)

    def earn(self, images: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `RewardSource.earn`."""
        return self.rewards[images, bins].astype(np.float32)
