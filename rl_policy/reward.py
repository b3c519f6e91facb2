"""What a chosen timestep earned: the reward head `teacher_task`, and the scale of rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RECENT = 0.9
"""What the classes of a step's images weigh a step later: little, to follow a policy that moves."""
SMOOTHING = 10
"""As of how many images the frequencies of all count in those of a bin."""


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

    Such a head can be told the answer: a policy that sees the image could give each class a bin of
    its own, which the head would learn to read, whatever the teacher shows. So the loss of one who
    knows the bin alone is given back: the reward is the pointwise V-information of the feature
    (Ethayarajh et al. 2022), what it tells beyond the bin. While all classes see the same bins,
    that is minus the task loss but for a constant an image. See `guesses`.

    Each channel is standardised by running figures, then scaled and shifted by amounts that
    depend on the bin (FiLM, Perez et al. 2018); two layers, 1x1 for dense tasks, follow. The
    trainer computes the loss of each image from the logits, and trains this with its optimizer.

    No statistic is taken over the batch alone, so any mix of timesteps will do, and a batch of one.

    Args:
        channels: C of the feature map.
        bins: K.
        classes: L, width of the logits.
        dense: logits at each position, or of the globally pooled map.
        hidden: width of the hidden layer, and of the embedding of bins.
    """

    seen: Tensor

    def __init__(
        self, channels: int, bins: int, classes: int, dense: bool, hidden: int = 64
    ) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(bins, classes))
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

    @torch.no_grad()
    def guesses(self, logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
        """What to reward by: the classes as the feature tells them, and as the bin alone does.

        The second are the classes' frequencies among the images that the bin was lately chosen for;
        of few images, nearer to those of all. A tenth of the frequencies of all is mixed into
        both, so that a head that is sure of the classes it saw does not deter the others.

        Args:
            logits: of `forward`.
            bins: (B,) int64 in 0..K-1.

        Returns:
            Log-probabilities, of the shape of `logits`, and (B, L).
        """
        everywhere = self.seen.sum(dim=0) + 1
        everywhere = everywhere / everywhere.sum()
        here = self.seen + SMOOTHING * everywhere
        here = here / here.sum(dim=1, keepdim=True)
        shape = (-1, *[1] * (logits.ndim - 2))  # over positions
        by_feature = 0.9 * logits.float().softmax(dim=1) + 0.1 * everywhere.view(shape)
        return by_feature.log(), (0.9 * here[bins] + 0.1 * everywhere).log()

    @torch.no_grad()
    def count(self, shares: Tensor, bins: Tensor) -> None:
        """Take in the classes (B, L) of images, as shares of their labels, that went to `bins`."""
        self.seen.mul_(RECENT).index_add_(0, bins, shares)
