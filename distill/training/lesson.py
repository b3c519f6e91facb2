"""What the policy chose for the images of a step, and what the teacher shows of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rl_policy.protocol import MixingPolicy, TimestepPolicy


class Choice(NamedTuple):
    """For each of B images."""

    bins: Tensor
    """(B,) int64; of a mixture the one nearest to its mean timestep."""
    timesteps: Tensor
    """(B,) int64, those of the bins; of a mixture its mean, rounded."""
    weights: Tensor | None = None
    """(B, K) float32, of a mixture."""

    def to(self, device: torch.device) -> Choice:
        """On the device; there the weights collect a gradient."""
        weights = self.weights
        if weights is not None:
            weights = weights.to(device).detach().requires_grad_()
        bins, timesteps = (x.to(device, non_blocking=True) for x in (self.bins, self.timesteps))
        return Choice(bins, timesteps, weights)


class Lesson(NamedTuple):
    """What the teacher shows for one batch."""

    choice: Choice
    """Of the policy, on the device."""
    maps: Mapping[str, Tensor]
    """Teacher layer -> (B, C, h, w); of a mixture with a gradient to its weights."""
    again: Mapping[str, Tensor] | None = None
    """The same under another draw of the noise, in steps that measure the target-noise floor."""


def choose(
    policy: TimestepPolicy | MixingPolicy,
    timesteps: Tensor,
    context: Tensor,
    generator: Generator,
    progress: float,
) -> Choice:
    """Ask the policy.

    Args:
        policy: One or the other.
        timesteps: (K,) int64, what its bins stand for.
        context: (B, D) float32, what it sees.
        generator: Its randomness.
        progress: Share of the policy's steps that are done.
    """
    if not isinstance(policy, MixingPolicy):
        bins = policy.act(context, generator, progress)
        return Choice(bins, timesteps[bins])
    weights = policy.mix(context, progress)
    mean = (weights @ timesteps.float()).round().long()
    return Choice((mean[:, None] - timesteps).abs().argmin(dim=1), mean, weights)


def mixture(weights: Tensor, at: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of a teacher's maps at all bins, with a gradient to the weights.

    Args:
        weights: (B, K) float32, rows that sum to 1.
        at: From a bin an image, (B,) int64 on the CPU, to maps by layer, (B, C, h, w).
    """
    mixed: dict[str, Tensor] = {}
    for index, weight in enumerate(weights.T):
        for layer, x in at(torch.full((len(weights),), index)).items():
            part = weight[:, None, None, None] * x
            mixed[layer] = mixed[layer] + part if layer in mixed else part
    return mixed
