"""One mixture of all timesteps instead of a choice among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_policy.options import check_range


class SoftMix:
    """A softmax over the bins, learned by gradient descent on the reward head's task loss.

    The target is the weighted sum of the features at all bins: see `MixingPolicy`. The weights are
    equal for all images. Weights per image would show the head what the policy saw, as bins with
    different means can be told apart in the mixture, whatever the teacher knows.

    Only the reward head's loss moves the weights. The feature loss would move them to the bin that
    is easiest to imitate, the one with the most noise or the least content.

    Args:
        learning_rate: of Adam.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        learning_rate: float = 0.02,
    ) -> None:
        check_range("learning_rate", learning_rate, above=0)
        self.logits = torch.zeros(bins, requires_grad=True)  # equal weights at first
        self.optimizer = torch.optim.Adam([self.logits], lr=learning_rate)

    def mix(self, context: Tensor, progress: float) -> Tensor:
        """See `MixingPolicy.mix`."""
        return self.probabilities(context)

    def learn(
        self, context: Tensor, weights: Tensor, gradients: Tensor, progress: float
    ) -> dict[str, float]:
        """See `MixingPolicy.learn`."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.logits.softmax(dim=0), gradients.mean(dim=0))
        self.optimizer.step()
        return {"largest_weight": self.logits.softmax(dim=0).max().item()}

    @torch.no_grad()
    def probabilities(self, context: Tensor) -> Tensor:
        """See `MixingPolicy.probabilities`."""
        return self.logits.softmax(dim=0).expand(len(context), -1)

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {"logits": self.logits.detach(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
