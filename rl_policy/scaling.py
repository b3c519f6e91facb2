"""Standardising by running figures: rewards, contexts, feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rl_policy.processes import moments, moments_of_all

MOMENTUM = 0.99
"""Weight of the past, once there is enough of it."""


class RunningScale(nn.Module):
    """Standardises with a running mean and variance of what it was shown.

    The mean and variance of all samples so far at first; from 1 / (1 - MOMENTUM) updates on an
    exponential average, because rewards and features drift while the networks that make them
    learn. Before the first update it passes its input on.

    Args:
        *shape: of one sample; none for a scalar such as the reward.
        shared: the figures are those of all processes, which are each shown some of the samples,
            as many each; otherwise this one's, which may have been shown all.
        floor: added to the variance, for numbers that hardly vary. 0 is for numbers on any scale:
            the floor is what float32 numbers of that mean lose to rounding.
        clip: results are clipped to [-clip, clip], so that one outlier, or a number that never
            varied before, cannot throw its reader off; None: they are not.
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
        """Take in N samples at once: (N, *shape) float32."""
        self.updates += 1
        rate = (1 / self.updates).clamp(min=1 - MOMENTUM)
        mean, variance = moments(samples)
        if self.shared:
            mean, variance = moments_of_all(mean, variance)
        # The variance of the mixture: within both parts, and between their means
        between = rate * (1 - rate) * (mean - self.mean).square()
        self.variance.copy_((1 - rate) * self.variance + rate * variance + between)
        self.mean.lerp_(mean, rate)

    def forward(self, samples: Tensor) -> Tensor:
        """Standardise samples (N, *shape) -> (N, *shape) float32."""
        scaled = (samples - self.mean).mul_(self.inverse_deviation())
        return scaled if self.clip is None else scaled.clamp_(-self.clip, self.clip)

    def inverse_deviation(self) -> Tensor:
        """What standardised samples are multiplied with, (*shape)."""
        least = self.floor or 1e-14 * self.mean.square() + 1e-30
        return (self.variance + least).rsqrt()


class ContextScale(RunningScale):
    """Standardises contexts (N, D), then divides by sqrt(D).

    So a context's squared length is 1 on average. What a linear layer learns from one image carries
    over to another by 1 + the product of their contexts, the 1 being the bias's share. With D in
    the hundreds it would be chance likeness that decides, and the policy would see a rule for
    each image before it saw which timestep is best for all.
    """

    def forward(self, samples: Tensor) -> Tensor:
        """Contexts (N, D) -> (N, D) float32."""
        return super().forward(samples) / math.sqrt(samples.shape[1])
