"""What a chosen timestep earned: `teacher_task`, `student_progress`, and sums of rewards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rl_policy.processes import of_all
from rl_policy.scaling import RunningScale

RECENT = 0.9
"""What the classes of a step's images weigh a step later: little, to follow a policy that moves."""
SMOOTHING = 10
"""As of how many images the frequencies of all count in those of a bin."""


class TeacherTaskReward(nn.Module):
    """The light head whose task loss on the teacher's feature map is, negated, the reward.

    That of RepFusion (Yang and Wang, ICCV 2023), but conditioned on the timestep: a
    head that all timesteps share stays behind the best of them, and the policy stays diffuse. As
    published: conditioned, standardised and beyond_bin False, hidden 256, layers 3.

    Such a head can be told the answer: a policy that sees the image could give each class a bin of
    its own, which the head would learn to read, whatever the teacher shows. So the loss of one who
    knows the bin alone is given back: the reward is the pointwise V-information of the feature
    (Ethayarajh et al. 2022), what it tells beyond the bin. While all classes see the same bins,
    that is minus the task loss but for a constant an image. See `guesses`.

    Each channel is standardised by running figures, then scaled and shifted by amounts that
    depend on the bin (FiLM, Perez et al. 2018); a perceptron, 1x1 for dense tasks, follows. The
    trainer computes the loss of each image from the logits, and trains this with its optimizer.

    No statistic is taken over the batch alone, so any mix of timesteps will do, and a batch of one.
    Running figures are those of all processes.

    Args:
        channels: C of the feature map.
        bins: K.
        classes: L, width of the logits.
        dense: logits at each position, or of the globally pooled map.
        hidden: width of the hidden layers, and of the embedding of bins.
        conditioned: whether the head is told the bin; a mixture of all bins has none.
        layers: linear layers of the perceptron, with ReLU between them.
        standardised: whether the feature's channels are standardised.
        beyond_bin: whether the loss of one who knows the bin alone is given back; otherwise the
            reward is minus the head's loss. The trainer asks for `guesses` accordingly.
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
            feature: (B, C, h, w) floating; a gradient reaches it, where it asks for one.
            bins: (B,) int64 in 0..K-1, that each image's feature was taken at.

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
        self.seen.mul_(RECENT).index_add_(0, of_all(bins), of_all(shares))


def student_progress(before: Tensor, after: Tensor) -> Tensor:
    """How much an update of the student lowered its own task loss: (B,) twice -> (B,).

    Both losses are of the same labelled images, augmented alike, with the student in evaluation
    mode: dropout and the other images of the batch play no part, so that the difference is what
    the update did and nothing else. It costs two more forward passes of the labelled images.

    The choice comes first and its effect is seen in the very next weights, so the reward is causal;
    it is not the choice's alone. The update is that of the whole batch, the task loss included.
    What all images share moves the mean, which policies take off; the rest is noise beside the
    part that is the image's own. It looks one step ahead: what pays only later is not in it.
    """
    return before - after


class WeightedRewards(nn.Module):
    """Several rewards as one: each standardised with its own running mean and scale, and weighted.

    So a weight says how much a reward counts, whatever its scale is. An image that a reward says
    nothing of (an unlabelled one, for a reward that needs labels) counts there with the mean, 0.

    One reward alone is not standardised but passed on, times its weight: policies standardise for
    themselves.

    Args:
        weights: of each reward, by name, one or more.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        several = len(self.weights) > 1
        self.scales = nn.ModuleList(RunningScale(floor=0) for _ in self.weights if several)

    @torch.no_grad()
    def forward(self, rewards: Tensor, known: Tensor) -> Tensor:
        """The weighted sum, after the running figures took these rewards in.

        Args:
            rewards: (N, R) float32, in the order of `weights`.
            known: (N, R) bool, which of them mean anything; if R is 1 all do.

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
