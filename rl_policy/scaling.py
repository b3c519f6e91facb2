"""Standardising by running figures: rewards, contexts, feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rl_policy.processes import moments, moments_of_all

MOMENTUM = 0.99
"""Weight of the past, once there is enough of it."""


class RunningScale(nn.Module):
    """Standardises by a running mean and variance of the samples seen so far.

    At first these are the mean and variance over all updates, which count equally; after
    1 / (1 - MOMENTUM) of them they become exponential averages, because rewards and features drift
    while the networks that make them learn. Before the first update samples are only clipped.

    Args:
        *shape: of one sample; none for a scalar such as the reward.
        shared: average over all processes, which must each give equally many samples; otherwise
            each process keeps figures of its own.
        floor: added to the variance, for numbers that hardly vary. 0 is for numbers on any scale:
            the floor is then the rounding error of float32 numbers of that mean.
        clip: clip results to [-clip, clip], so that one outlier, or a number that never varied
            before, cannot disturb the reader; None: no clipping.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(
        self,
        *shape: int,
        shared: bool = False,
        floor: float = 1e-8,
        clip: float | None = 10,
    ) -> None:
        super().__init__()
        self.shared, self.floor, self.clip = shared, floor, clip
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Update the running figures with N samples: (N, *shape) float32."""
        self.updates += 1
        rate = (1 / self.updates).clamp(min=1 - MOMENTUM)
        mean, variance = moments(samples)
        if self.shared:
            mean, variance = moments_of_all(mean, variance)
        # The variance of the mixture: within both parts, plus between their means
        between = rate * (1 - rate) * (mean - self.mean).square()
        self.variance.copy_((1 - rate) * self.variance + rate * variance + between)
        self.mean.lerp_(mean, rate)

    def forward(self, samples: Tensor) -> Tensor:
        """Standardise samples (N, *shape) -> (N, *shape) float32."""
        scaled = (samples - self.mean).mul_(self.inverse_deviation())
        return scaled if self.clip is None else scaled.clamp_(-self.clip, self.clip)

    def inverse_deviation(self) -> Tensor:
        """The factor (*shape) that standardising multiplies by."""
        least = self.floor or 1e-14 * self.mean.square() + 1e-30
        return (self.variance + least).rsqrt()


class ContextScale(RunningScale):
    """Standardises contexts (N, D), then divides by sqrt(D).

    So a context's squared length is 1 on average. A linear layer transfers what it learns from one
    image to another in proportion to 1 + the product of their contexts, with 1 from the bias. With
    D in the hundreds, chance similarity would dominate otherwise, and the policy would learn a rule
    for each image before the timestep that is best for all.
    """

    def forward(self, samples: Tensor) -> Tensor:
        """Standardise contexts (N, D) -> (N, D) float32."""
        return super().forward(samples) / math.sqrt(samples.shape[1])
