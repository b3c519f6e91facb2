"""REINFORCE as RepFusion uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from rl_policy.options import check_range, refuse_unknown
from rl_policy.reward import RunningScale
from rl_policy.seeding import seeded_torch


class Reinforce:
    """Policy gradient with an entropy bonus (RepFusion: Yang and Wang, ICCV 2023).

    Minimises -mean(reward x log p(bin | context)) - weight x mean entropy, one step of Adam each
    time. Contexts are standardised by a running mean and variance.

    Args:
        learning_rate: of Adam.
        entropy_weight: at the start; it falls linearly to 0.
        entropy_until: the share of training after which it is 0.
        baseline: standardise the rewards by a running mean and scale, which learns faster, and on
            any scale of rewards; as published they are used as they come.
        hidden: width of the one hidden layer.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        learning_rate: float = 1e-3,
        entropy_weight: float = 0.1,
        entropy_until: float = 0.5,
        baseline: bool = True,
        hidden: int = 64,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        check_range("learning_rate", learning_rate, above=0)
        check_range("entropy_weight", entropy_weight, least=0)
        check_range("entropy_until", entropy_until, above=0, most=1)
        check_range("hidden", hidden, least=1, whole=True)
        self.entropy_weight, self.entropy_until = entropy_weight, entropy_until
        self.context_scale = RunningScale(context_size)
        self.reward_scale = RunningScale() if baseline else None
        with seeded_torch(seed):
            last = nn.Linear(hidden, bins)
            self.network = nn.Sequential(nn.Linear(context_size, hidden), nn.ReLU(), last)
        # Every bin alike until there are rewards
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        probabilities = self.probabilities(context)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        if self.reward_scale is not None:
            self.reward_scale.update(rewards)
            rewards = self.reward_scale(rewards)
        log_probabilities = self.network(self.context_scale(context)).log_softmax(dim=-1)
        chosen = log_probabilities.gather(1, bins[:, None]).squeeze(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
        weight = self.entropy_weight * max(0.0, 1 - progress / self.entropy_until)
        policy_loss = -(rewards * chosen).mean()
        self.optimizer.zero_grad()
        (policy_loss - weight * entropy).backward()
        self.optimizer.step()
        # After the step: it must see the contexts on the scale on which `act` saw them
        self.context_scale.update(context)
        return {"policy_loss": policy_loss.item(), "entropy_weight": weight}

    @torch.no_grad()
    def probabilities(self, context: Tensor) -> Tensor:
        logits: Tensor = self.network(self.context_scale(context))
        return logits.softmax(dim=-1)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        parts: dict[str, nn.Module | torch.optim.Optimizer] = {
            "network": self.network,
            "optimizer": self.optimizer,
            "context_scale": self.context_scale,
        }
        return parts | ({"reward_scale": self.reward_scale} if self.reward_scale else {})
