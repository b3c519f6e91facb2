"""What a chosen timestep earned: the reward head `teacher_task`, and the scale of rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningScale(nn.Module):
    """Standardises with a running mean and variance of what it was shown.

    The mean and variance of all samples so far at first; from 1 / (1 - momentum) updates on an
    exponential average, because rewards and features drift while the networks that make them
    learn. Before the first update it passes its input on. Results are clipped to [-10, 10], so
    that one outlier, or a number that never varied before, cannot throw its reader off.

    Args:
        *shape: of one sample; none for a scalar such as the reward.
        momentum: weight of the past, once there is enough of it.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, *shape: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Take in N samples at once: (N, *shape) float32."""
        self.updates += 1
        rate = (1 / self.updates).clamp(min=1 - self.momentum)
        mean = samples.mean(dim=0)
        variance = samples.var(dim=0, correction=0)
        # The variance of the mixture: within both parts, and between their means
        between = rate * (1 - rate) * (mean - self.mean).square()
        self.variance.copy_((1 - rate) * self.variance + rate * variance + between)
        self.mean.lerp_(mean, rate)

    def forward(self, samples: Tensor) -> Tensor:
        """Standardise samples (N, *shape) -> (N, *shape) float32 in [-10, 10]."""
        return ((samples - self.mean) * (self.variance + 1e-8).rsqrt()).clamp(-10, 10)


class TeacherTaskReward(nn.Module):
    """The light head whose task loss on the teacher's feature map is, negated, the reward.

    That of RepFusion (Yang and Wang, ICCV 2023), but conditioned on the timestep: a
    head that all timesteps share stays behind the best of them, and the policy stays diffuse.
    Here each channel is standardised by running figures, then scaled and shifted by amounts that
    depend on the bin (FiLM, Perez et al. 2018); two layers, 1x1 for dense tasks, follow. The
    trainer computes the loss of each image from the logits, and trains this with its optimizer.

    No statistic is taken over the batch alone, so any mix of timesteps will do, and a batch of one.

    Args:
        channels: C of the feature map.
        bins: K.
        classes: width of the logits.
        dense: logits at each position, or of the globally pooled map.
        hidden: width of the hidden layer, and of the embedding of bins.
    """

    def __init__(
        self, channels: int, bins: int, classes: int, dense: bool, hidden: int = 64
    ) -> None:
        super().__init__()
        self.dense = dense
        self.standardise = RunningScale(channels)
        self.embedding = nn.Embedding(bins, hidden)
        self.film = nn.Linear(hidden, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.head = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, feature: Tensor, bins: Tensor) -> Tensor:
        """Logits from a teacher's feature map.

        Args:
            feature: (B, C, h, w) floating, without gradient.
            bins: (B,) int64 in 0..K-1, that each image's feature was taken at.

        Returns:
            (B, classes), or (B, classes, h, w) if dense.
        """
        x = feature.float()
        if not self.dense:
            x = x.mean(dim=(2, 3), keepdim=True)
        x = x.movedim(1, -1)  # (B, h, w, C)
        if self.training:
            self.standardise.update(x.flatten(end_dim=2))
        scale, shift = self.film(self.embedding(bins))[:, None, None].chunk(2, dim=-1)
        logits: Tensor = self.head(self.standardise(x) * (1 + scale) + shift).movedim(-1, 1)
        return logits if self.dense else logits.flatten(start_dim=1)
