"""Rewards of chosen timesteps: `teacher_task`, `student_progress`, and weighted sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rl_policy.processes import of_all
from rl_policy.scaling import RunningScale

RECENT = 0.9
"""Decay per step of the counted classes, low enough to follow a policy that changes."""
SMOOTHING = 10
"""Number of images that the overall class frequencies count as in those of a bin."""


class TeacherTaskReward(nn.Module):
    """The light head whose negative task loss on the teacher's feature map is the reward.

    It is RepFusion's (Yang and Wang, ICCV 2023), but conditioned on the timestep: a head shared by
    all timesteps is worse than the best one at each, and the policy stays diffuse. As published:
    conditioned, standardised and beyond_bin False, hidden 256, layers 3.

    A conditioned head can learn the answer from the bin: a policy that sees the image could give
    each class its own bin, whatever the teacher shows. So the loss of a guess from the bin alone is
    added back: the reward is the feature's pointwise V-information beyond the bin (Ethayarajh et
    al. 2022). While all classes see the same bins, that is minus the task loss up to a constant per
    image. See `guesses`.

    Each channel is standardised by running figures, then scaled and shifted by amounts that
    depend on the bin (FiLM, Perez et al. 2018); a perceptron, 1x1 for dense tasks, follows. The
    trainer computes each image's loss from the logits, and trains this head with its optimizer.

    No statistic depends on the batch alone, so any mix of timesteps works, and a batch of one.
    Running figures are those of all processes.

    Args:
        channels: C of the feature map.
        bins: K.
        classes: L, width of the logits.
        dense: whether logits are per position; otherwise they are of the globally pooled map.
        hidden: width of the hidden layers, and of the embedding of bins.
        conditioned: whether the head knows the bin; a mixture of all bins has none.
        layers: number of linear layers of the perceptron, with ReLU between them.
        standardised: whether the feature's channels are standardised.
        beyond_bin: whether the loss of a guess from the bin alone is added back; otherwise the
            reward is minus the head's loss. The trainer calls `guesses` accordingly.
    """

    seen: Tensor

    def __init__(
        self,
        channels: int,
        bins: int,
        classes: int,
        dense: bool,
        hidden: int = 64,
        conditioned: bool = True,
        layers: int = 2,
        standardised: bool = True,
        beyond_bin: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(bins, classes))
        self.dense, self.conditioned, self.beyond_bin = dense, conditioned, beyond_bin
        self.standardise = RunningScale(channels, shared=True) if standardised else None
        if conditioned:
            self.embedding = nn.Embedding(bins, hidden)
            self.film = nn.Linear(hidden, 2 * channels)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        widths = [channels, *[hidden] * (layers - 1)]
        inner = (part for width in widths[:-1] for part in (nn.Linear(width, hidden), nn.ReLU()))
        self.head = nn.Sequential(*inner, nn.Linear(widths[-1], classes))

    def forward(self, feature: Tensor, bins: Tensor) -> Tensor:
        """Logits from a teacher's feature map.

        Args:
            feature: (B, C, h, w) floating; it gets a gradient if it requires one.
            bins: (B,) int64 in 0..K-1, the bin of each image's feature.

        Returns:
            (B, classes), or (B, classes, h, w) if dense.
        """
        x = feature.float()
        if not self.dense:
            x = x.mean(dim=(2, 3), keepdim=True)
        x = x.movedim(1, -1)  # (B, h, w, C)
        if self.standardise is not None:
            if self.training:
                self.standardise.update(x.flatten(end_dim=2))
            x = self.standardise(x)
        if self.conditioned:
            scale, shift = self.film(self.embedding(bins))[:, None, None].chunk(2, dim=-1)
            x = torch.addcmul(shift, x, 1 + scale)
        logits: Tensor = self.head(x).movedim(-1, 1)
        return logits if self.dense else logits.flatten(start_dim=1)

    @torch.no_grad()
    def guesses(self, logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the classes, from the feature and from the bin alone.

        The second are the class frequencies among the images that recently got the bin; with few
        images, they stay near those of all. A tenth of the overall frequencies is mixed into both,
        so that a head that is sure of the classes it saw does not deter the others.

        Args:
            logits: from `forward`.
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
        """Count the classes of images at `bins`. shares: (B, L), of each class in a label."""
        self.seen.mul_(RECENT).index_add_(0, of_all(bins), of_all(shares))


def student_progress(before: Tensor, after: Tensor) -> Tensor:
    """How much an update of the student lowered its own task loss: two (B,) -> (B,).

    Both losses are of the same labelled images with equal augmentation and the student in
    evaluation mode: dropout and the other images of the batch have no effect, so the difference is
    due to the update alone. It costs two more forward passes of the labelled images.

    The choice precedes the update, so the reward is causal, but not due to the choice alone: the
    update is that of the whole batch, including the task loss. What all images share moves the
    mean, which policies subtract; the rest is noise beside the image's own part. The reward looks
    one step ahead and misses what pays only later.
    """
    return before - after


class WeightedRewards(nn.Module):
    """A weighted sum of rewards, each standardised by its own running mean and scale.

    So a weight says how much a reward counts, whatever its scale. An image without a value of a
    reward (an unlabelled one, for a reward that needs labels) gets its mean there, 0.

    A single reward is not standardised, only multiplied by its weight: policies standardise rewards
    themselves.

    Args:
        weights: of each reward, by name; at least one.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        several = len(self.weights) > 1
        self.scales = nn.ModuleList(RunningScale(floor=0) for _ in self.weights if several)

    @torch.no_grad()
    def forward(self, rewards: Tensor, known: Tensor) -> Tensor:
        """The weighted sum, after updating the running figures with these rewards.

        Args:
            rewards: (N, R) float32, in the order of `weights`.
            known: (N, R) bool, which of them are valid; if R is 1 all are.

        Returns:
            (N,) float32.
        """
        if not self.scales:
            (weight,) = self.weights.values()
            return weight * rewards[:, 0]
        total = rewards.new_zeros(len(rewards))
        for index, (weight, scale) in enumerate(
            zip(self.weights.values(), self.scales, strict=True)
        ):
            rows = known[:, index]
            mine = rewards[rows, index]
            if len(mine):
                scale.update(mine)  # type: ignore[operator]
                total[rows] += weight * scale(mine)
        return total
