"""Policies that do not learn, as baselines for those that do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from rl_policy.options import OptionError, check_range
from rl_policy.table import ReplayTable


class Fixed:
    """Chooses one bin for all images.

    Args:
        bin: index of the bin, 0 (the least noise) to K-1.
    """

    def __init__(
        self, context_size: int, bins: int, batch: int, seed: int, *, bin: int = 0
    ) -> None:
        check_range("bin", bin, least=0, most=bins - 1, whole=True)
        self.bins, self.bin = bins, bin

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return torch.full((len(context),), self.bin)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        return {}

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return one_hot(torch.full((len(context),), self.bin), self.bins).float()

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        pass


class Grid(Fixed):
    """Chooses for all images the bin nearest to the best timestep of a probe.

    Args:
        table: file of recorded rewards (`ReplayTable.read`); the best timestep has the largest
            mean reward.
        timesteps: (K,) int64, those of the bins.
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
        """See `TimestepPolicy.state_dict`."""
        return {"bin": self.bin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.bin = state["bin"]


class Uniform:
    """Chooses every bin with equal probability."""

    def __init__(self, context_size: int, bins: int, batch: int, seed: int) -> None:
        self.bins = bins

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return torch.randint(self.bins, (len(context),), generator=generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        return {}

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return torch.full((len(context), self.bins), 1 / self.bins)

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        pass


class LinearDecay:
    """Chooses uniformly among the lowest bins, whose number falls as training proceeds.

    It falls from K to 1, with an equal share of the steps for each number:
    max(1, K - floor(progress x K)).
    """

    def __init__(self, context_size: int, bins: int, batch: int, seed: int) -> None:
        self.bins = bins
        self.allowed = bins

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        self.allowed = max(1, self.bins - int(progress * self.bins))
        return torch.randint(self.allowed, (len(context),), generator=generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        return {"allowed_bins": float(self.allowed)}

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        probabilities = torch.zeros(len(context), self.bins)
        probabilities[:, : self.allowed] = 1 / self.allowed
        return probabilities

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {"allowed": self.allowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.allowed = state["allowed"]
