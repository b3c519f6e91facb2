"""REINFORCE as RepFusion uses it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rl_policy.drawing import draw
from rl_policy.options import WIDEST, OptionError, check_choice, check_flag, check_range
from rl_policy.scaling import ContextScale, RunningScale
from rl_policy.seeding import seeded_torch


class Reinforce:
    """Policy gradient with an entropy bonus (RepFusion: Yang and Wang, ICCV 2023).

    `learn` takes one optimiser step on -mean(reward x log p(bin | context)) - weight x mean
    entropy.

    Args:
        network: "mlp", one hidden layer on contexts standardised by a running mean and variance;
            "conv", for contexts that are images: three 3x3 convolutions of stride 2, and a linear
            layer on their average over all positions.
        hidden: width of the hidden layers.
        optimizer: "adam", or "sgd" with plain momentum 0.9.
        learning_rate: at the start.
        rate_drops: shares of the steps with a teacher, after each of which the rate falls to a
            tenth.
        weight_decay: L2 penalty on all weights.
        entropy_weight: weight of the entropy bonus at the start; it falls linearly to 0.
        entropy_until: share of the steps with a teacher after which that weight is 0.
        baseline: standardise the rewards by a running mean and scale, which learns faster and on
            any scale of rewards; the published method uses raw rewards.
        image_size: side in px if contexts are images, otherwise None.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        network: str = "mlp",
        hidden: int = 64,
        optimizer: str = "adam",
        learning_rate: float = 3e-3,
        rate_drops: Sequence[float] = (),
        weight_decay: float = 0.0,
        entropy_weight: float = 0.1,
        entropy_until: float = 0.5,
        baseline: bool = True,
        image_size: int | None = None,
    ) -> None:
        check_choice("network", network, ("mlp", "conv"))
        check_range("hidden", hidden, least=1, most=WIDEST, whole=True)
        check_choice("optimizer", optimizer, ("adam", "sgd"))
        check_range("learning_rate", learning_rate, above=0)
        _check_drops(rate_drops)
        check_range("weight_decay", weight_decay, least=0)
        check_flag("baseline", baseline)
        check_range("entropy_weight", entropy_weight, least=0)
        check_range("entropy_until", entropy_until, above=0, most=1)
        self.learning_rate, self.rate_drops = learning_rate, tuple(rate_drops)
        self.entropy_weight, self.entropy_until = entropy_weight, entropy_until
        self.context_scale = ContextScale(context_size) if network == "mlp" else None
        self.reward_scale = RunningScale(floor=0) if baseline else None
        with seeded_torch(seed):
            last = nn.Linear(hidden, bins)
            if network == "mlp":
                layers = [nn.Linear(context_size, hidden), nn.ReLU()]
            else:
                layers = convolutions(image_size, hidden)
            self.network = nn.Sequential(*layers, last)
        # All bins are equally likely until there are rewards
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        make = torch.optim.Adam if optimizer == "adam" else partial(torch.optim.SGD, momentum=0.9)
        self.optimizer: torch.optim.Optimizer = make(
            self.network.parameters(), lr=learning_rate, weight_decay=weight_decay
        )

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return draw(self.probabilities(context), generator)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        if self.reward_scale is not None:
            self.reward_scale.update(rewards)
            rewards = self.reward_scale(rewards)
        log_probabilities = self._logits(context).log_softmax(dim=-1)
        chosen = log_probabilities.gather(1, bins[:, None]).squeeze(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
        weight = self.entropy_weight * max(0.0, 1 - progress / self.entropy_until)
        policy_loss = -(rewards * chosen).mean()
        drops = sum(progress > share for share in self.rate_drops)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * 0.1**drops
        self.optimizer.zero_grad()
        torch.autograd.backward(policy_loss - weight * entropy)
        self.optimizer.step()
        # After the step: it must see the contexts on the scale on which `act` saw them
        if self.context_scale is not None:
            self.context_scale.update(context)
        return {"policy_loss": policy_loss.item(), "entropy_weight": weight}

    @torch.no_grad()
    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return self._logits(context).softmax(dim=-1)

    def _logits(self, context: Tensor) -> Tensor:
        # Images lie in [0, 1], and need no running figures
        scaled = 2 * context - 1 if self.context_scale is None else self.context_scale(context)
        logits: Tensor = self.network(scaled)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        parts: dict[str, nn.Module | torch.optim.Optimizer | None] = {
            "network": self.network,
            "optimizer": self.optimizer,
            "context_scale": self.context_scale,
            "reward_scale": self.reward_scale,
        }
        return {name: part for name, part in parts.items() if part is not None}


def convolutions(image_size: int | None, width: int) -> list[nn.Module]:
    """Layers from flattened images (B, 3 S S) to (B, width), for S of at least 1 px.

    Raises:
        OptionError: contexts are not images.
    """
    if image_size is None:
        raise OptionError(
            "network=conv reads only images; set policy.context=image and policy.progress=false"
        )
    layers: list[nn.Module] = [nn.Unflatten(1, (3, image_size, image_size))]
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _check_drops(shares: Sequence[float]) -> None:
    if not isinstance(shares, list | tuple):
        raise OptionError(f"rate_drops must be a list of shares of training, got {shares!r}")
    for share in shares:
        check_range("rate_drops", share, above=0, most=1)
