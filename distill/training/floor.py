"""The target-noise floor of a run: what no student can predict, by pair and timestep bin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def distinct(pairs: Sequence[str], losses: Sequence[str]) -> list[str]:
    """Unique names for pairs of feature maps: equal pairs get the name of the loss appended and, if
    that is equal too, a number."""
    named = [
        f"{pair}-{loss.rpartition(':')[2]}" if pairs.count(pair) > 1 else pair
        for pair, loss in zip(pairs, losses, strict=True)
    ]
    return [f"{name}-{i}" if named.count(name) > 1 else name for i, name in enumerate(named)]


class NoiseFloor:
    """Means of what `FeatureLoss.noise_floor` measured.

    Args:
        pairs: Name of each pair of feature maps, see `distinct`.
        bins: K, number of timesteps on offer.
    """

    def __init__(self, pairs: Sequence[str], bins: int) -> None:
        self.pairs = tuple(pairs)
        self._sum = torch.zeros(bins, len(pairs), dtype=torch.float64)
        self._count = torch.zeros(bins, 1, dtype=torch.float64)

    def add(self, measured: Tensor, bins: Tensor) -> None:
        """Add measurements (B, pairs), made at bins (B,) int64."""
        self._sum.index_add_(0, bins, measured.double())
        self._count.index_add_(0, bins, torch.ones(len(bins), 1, dtype=torch.float64))

    def means(self) -> dict[str, float]:
        """Mean of all measurements by pair; empty before the first one."""
        if not self._count.sum():
            return {}
        means = self._sum.sum(dim=0) / self._count.sum()
        return dict(zip(self.pairs, means.tolist(), strict=True))

    def by_bin(self) -> dict[str, list[float | None]]:
        """Means (K,) of each pair; None for a bin that was never measured."""
        table = (self._sum / self._count).T.tolist()
        rows = [[None if math.isnan(x) else x for x in row] for row in table]
        return dict(zip(self.pairs, rows, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sum, self._count = state["sum"], state["count"]
