"""The reward `label_free`: what the teacher's feature says about clusters instead of labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_policy.processes import of_all
from rl_policy.reward import TeacherTaskReward
from rl_policy.scaling import RunningScale

TEMPERATURE = 0.05
"""Temperature of the softmax over clusters, whose scores are cosines (SwAV, Caron et al. 2020)."""
QUEUE = 512
"""Number of last images among which the clusters have equal shares."""
ITERATIONS = 3
"""Iterations of Sinkhorn's algorithm per step, starting from the last step's result."""
PAST = 0.99
"""Decay per step of earlier images' weights in the centres of bins and clusters."""


class LabelFreeReward(nn.Module):
    """`TeacherTaskReward` on pseudo-labels: clusters of the teacher's features.

    A cluster of the rewarded feature itself would prove nothing, as noise predicts its own cluster
    best: the pseudo-label must not depend on the chosen bin. So the clustered quantity is the part
    of the pooled teacher feature that the image decides, its mean over bins and noise: a linear map
    of the student's pooled feature is regressed on the features at the chosen bins, and its
    prediction gives the image's cluster. Each bin's features are centred separately first, or the
    mean would reveal which images get which bins. A bin of pure noise does not move the regression
    and predicts no cluster, so it earns nothing.

    Images are assigned to clusters by Sinkhorn's algorithm with equal shares, over the last images
    rather than one batch, which may be smaller than the number of clusters (SwAV, Caron et al.
    2020, with its queue). So putting all images into one cluster is never a solution. Cluster
    centres are running means of their images' predictions, on the unit sphere.

    All processes share their pooled features here, and have the same clusters and scales.

    Args:
        channels: C of the teacher's feature map.
        student_channels: D of the student's pooled feature.
        bins: K.
        clusters: P.
    """

    counts: Tensor
    sums: Tensor
    queue: Tensor
    prototypes: Tensor
    potentials: Tensor

    def __init__(self, channels: int, student_channels: int, bins: int, clusters: int = 16) -> None:
        super().__init__()
        self.head = TeacherTaskReward(channels, bins, clusters, dense=False)
        self.scale = RunningScale(channels, shared=True)
        self.student_scale = RunningScale(student_channels, shared=True)
        self.regression = nn.Linear(student_channels, channels, bias=False)
        nn.init.zeros_(self.regression.weight)  # nothing is known of an image yet
        self.register_buffer("counts", torch.zeros(bins))
        self.register_buffer("sums", torch.zeros(bins, channels))
        # Spread over all clusters until there are images
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE, channels), dim=1))
        self.register_buffer("prototypes", F.normalize(torch.randn(clusters, channels), dim=1))
        self.register_buffer("potentials", torch.zeros(clusters))

    def forward(self, feature: Tensor, bins: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Losses to train on these images, and their rewards; in float32 despite autocast.

        Args:
            feature: (B, C, h, w) floating, the teacher's, without gradient.
            bins: (B,) int64 in 0..K-1, the bins of the feature.
            student: (B, D) floating, the student's pooled feature, without gradient.

        Returns:
            Losses (B,) of regression and head, and rewards (B,) without gradient: what the feature
            says about the pseudo-label beyond the bin, in nats. In training mode running figures
            are updated.
        """
        with torch.autocast(feature.device.type, enabled=False):
            student = student.float()
            if self.training:
                self.student_scale.update(student)
            predicted = self.regression(self.student_scale(student))
            target = self._centred(feature.float().mean(dim=(2, 3)), bins)
            if self.training:
                self._balance(predicted)
            codes = self.codes(predicted)
            logits = self.head(feature, bins)
            losses = (predicted - target).square().mean(dim=1)
            losses = losses + F.cross_entropy(logits, codes, reduction="none")
            by_feature, by_bin = self.head.guesses(logits, bins)
            rewards = (codes * (by_feature - by_bin)).sum(dim=1)
            if self.training:
                self.head.count(codes, bins)
                self._follow(predicted, codes)
        return losses, rewards

    @torch.no_grad()
    def codes(self, predicted: Tensor) -> Tensor:
        """Pseudo-labels, a distribution over clusters per image: predictions (B, C) -> (B, P)."""
        codes: Tensor = (self._scores(F.normalize(predicted, dim=1)) + self.potentials).softmax(1)
        return codes

    def _scores(self, directions: Tensor) -> Tensor:
        return directions @ self.prototypes.T / TEMPERATURE

    @torch.no_grad()
    def _centred(self, pooled: Tensor, bins: Tensor) -> Tensor:
        """Pooled features (B, C), standardised, minus the running mean of their bin."""
        if self.training:
            self.scale.update(pooled)
        standardised: Tensor = self.scale(pooled)
        if self.training:
            chosen = F.one_hot(of_all(bins), len(self.counts)).to(standardised)  # (B, K)
            self.counts.mul_(PAST).add_(chosen.sum(dim=0))
            self.sums.mul_(PAST).add_(chosen.T @ of_all(standardised))
        # One more image at the mean of all: a bin of few images is hardly moved
        return standardised - (self.sums / (self.counts + 1)[:, None])[bins]

    @torch.no_grad()
    def _balance(self, predicted: Tensor) -> None:
        """Lower the potential of clusters that have more than their share of the last images."""
        newest = F.normalize(of_all(predicted.detach()), dim=1)
        self.queue.copy_(torch.cat([self.queue, newest])[-len(self.queue) :])
        scores = self._scores(self.queue)  # (Q, P)
        share = math.log(len(scores) / scores.shape[1])
        for _ in range(ITERATIONS):
            log_codes = (scores + self.potentials).log_softmax(dim=1)
            self.potentials.sub_(log_codes.logsumexp(dim=0) - share)

    @torch.no_grad()
    def _follow(self, predicted: Tensor, codes: Tensor) -> None:
        """Move the cluster centres towards their images, in proportion to how many they have."""
        directions, codes = F.normalize(of_all(predicted.detach()), dim=1), of_all(codes)
        members = codes.sum(dim=0)[:, None]  # (P, 1)
        pace = ((1 - PAST) * len(members) / len(codes) * members).clamp(max=1)
        moved = self.prototypes.lerp(codes.T @ directions / members.clamp(min=1e-6), pace)
        self.prototypes.copy_(F.normalize(moved, dim=1))
