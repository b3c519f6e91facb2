"""What an image earns whatever is chosen for it, taken off what a choice earned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rl_policy.scaling import RunningScale

FORGETTING = 0.1
"""Least weight of an image's newest reward in its mean: what it earns drifts as the heads learn."""


class ImageBaseline(nn.Module):
    """Takes off each reward what the same image has earned before.

    An image that is hard is hard at every timestep, so that most of a reward's variance says
    nothing of the choice: 85% on CIFAR-10 among timesteps up to 200. Labelled images are few and
    come back; what one has earned before does not depend on the choice of the moment, and as a
    baseline it leaves the policy's gradient the same in expectation, with less variance (Williams
    1992). A critic of the context cannot stand in for it: it does not know the label.

    Rewards count from the running mean of all images, and an image's mean as if one reward of 0 had
    come first.

    Args:
        images: how many images can come back.
    """

    own: Tensor
    visits: Tensor

    def __init__(self, images: int) -> None:
        super().__init__()
        self.all = RunningScale()
        self.register_buffer("own", torch.zeros(images))
        self.register_buffer("visits", torch.zeros(images, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, places: Tensor, rewards: Tensor) -> Tensor:
        """Take in a step's rewards; each less its image's baseline of before.

        Args:
            places: (N,) int64, which image each is of, 0 to images - 1; -1 for one that is not
                known, whose baseline is that of all images.
            rewards: (N,) float32.

        Returns:
            (N,) float32.
        """
        self.all.update(rewards)
        above = rewards - self.all.mean
        known = places >= 0
        mine = places[known]
        less = above.clone()
        less[known] -= self.own[mine]
        images, which, counts = torch.unique(mine, return_inverse=True, return_counts=True)
        sums = above.new_zeros(len(images)).index_add(0, which, above[known])
        self.visits[images] += counts
        rate = (counts / (self.visits[images] + 1)).clamp(min=FORGETTING)
        self.own[images] += rate * (sums / counts - self.own[images])
        return less
