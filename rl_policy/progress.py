"""A wrapper that shows a policy how far training is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from rl_policy.protocol import TimestepPolicy


class WithProgress:
    """Shows a policy the progress of training as an additional last number of every context.

    Progress is equal for all images of a step, and in a bandit each value appears once: it can
    show a policy that what paid early does not pay late, but not which image it looks at.

    Args:
        policy: A policy built for contexts with one more number.
    """

    def __init__(self, policy: TimestepPolicy) -> None:
        self.policy = policy
        self.progress = 0.0  # of the next step

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return self.policy.act(self._beside(context), generator, progress)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        figures = self.policy.learn(self._beside(context), bins, rewards, progress)
        self.progress = progress
        return figures

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return self.policy.probabilities(self._beside(context))

    def _beside(self, context: Tensor) -> Tensor:
        """(B, D) -> (B, D + 1)."""
        return torch.cat([context, context.new_full((len(context), 1), self.progress)], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {"policy": self.policy.state_dict(), "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.policy.load_state_dict(state["policy"])
        self.progress = state["progress"]
