"""A policy's preferences in a few figures."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PolicySummary(NamedTuple):
    """Figures over a batch of images. Entropies are in nats, between 0 and log K."""

    mean: Tensor
    """(K,) float32: the distribution over bins, averaged over the images."""
    entropy: float
    """Entropy of `mean`: how spread the policy is over all images."""
    effective_arms: float
    """exp(entropy), from 1 (one bin for all images) to K (all bins equally likely)."""
    image_entropy: float
    """Mean entropy per image. Far below `entropy` means that the choice depends on the image."""


def policy_summary(probabilities: Tensor) -> PolicySummary:
    """Summarise the distributions of a batch of images over the bins: (B, K) float32, B >= 1."""
    mean = probabilities.mean(dim=0)
    entropy = _entropy(mean).item()
    return PolicySummary(mean, entropy, math.exp(entropy), _entropy(probabilities).mean().item())


def _entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis: (..., K) -> (...)."""
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy
