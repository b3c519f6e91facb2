"""Policies that learn nothing: the yardsticks for those that do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from rl_policy.options import OptionError, check_range
from rl_policy.table import ReplayTable


class Fixed:
    """The same bin for every image.

    Args:
        bin: index of the bin, 0 (the least noise) to K-1.
    """

    def __init__(
        self, context_size: int, bins: int, batch: int, seed: int, *, bin: int = 0
    ) -> None:
        check_range("bin", bin, least=0, most=bins - 1, whole=True)
        self.bins, self.bin = bins, bin

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        return torch.full((len(context),), self.bin)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        return {}

    def probabilities(self, context: Tensor) -> Tensor:
        return one_hot(torch.full((len(context),), self.bin), self.bins).float()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Grid(Fixed):
    """The best timestep of a probe for every image: that of the bin nearest to it.

    Args:
        table: the file of recorded rewards, which `ReplayTable.read` reads; the best timestep is
            that of the largest mean reward.
        timesteps: (K,) int64, what the bins stand for.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        timesteps: Tensor,
        table: str | None = None,
    ) -> None:
        if not isinstance(table, str):
            raise OptionError(
                "table must be the recorded rewards of a probe: the FOLDER/table.safetensors that "
                "`distill probe` writes"
            )
        try:
            recorded = ReplayTable.read(table)
        except (OSError, ValueError) as error:
            raise OptionError(f"table: {error}") from error
        assert recorded.timesteps is not None
        best = int(recorded.timesteps[recorded.rewards.mean(axis=0, dtype="float64").argmax()])
        nearest = int((timesteps - best).abs().argmin())
        super().__init__(context_size, bins, batch, seed, bin=nearest)

    def state_dict(self) -> dict[str, Any]:
        return {"bin": self.bin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bin = state["bin"]


class Uniform:
    """Every bin alike, whatever the image."""

    def __init__(self, context_size: int, bins: int, batch: int, seed: int) -> None:
        self.bins = bins

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        return torch.randint(self.bins, (len(context),), generator=generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        return {}

    def probabilities(self, context: Tensor) -> Tensor:
        return torch.full((len(context), self.bins), 1 / self.bins)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LinearDecay:
    """Uniform over the lowest bins, of which fewer and fewer are allowed as training goes on.

    All K at the start and one at the end, each number for an equal share of the steps:
    max(1, K - floor(progress x K)).
    """

    def __init__(self, context_size: int, bins: int, batch: int, seed: int) -> None:
        self.bins = bins
        self.allowed = bins

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        self.allowed = max(1, self.bins - int(progress * self.bins))
        return torch.randint(self.allowed, (len(context),), generator=generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        return {"allowed_bins": float(self.allowed)}

    def probabilities(self, context: Tensor) -> Tensor:
        probabilities = torch.zeros(len(context), self.bins)
        probabilities[:, : self.allowed] = 1 / self.allowed
        return probabilities

    def state_dict(self) -> dict[str, Any]:
        return {"allowed": self.allowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.allowed = state["allowed"]
