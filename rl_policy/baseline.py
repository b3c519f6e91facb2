"""A baseline per image: what it earns on average is subtracted from its rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rl_policy.scaling import RunningScale

FORGETTING = 0.1
"""Least weight of the newest reward in an image's mean, as rewards drift while the heads learn."""


class ImageBaseline(nn.Module):
    """Subtracts from each reward what the same image earned before.

    A hard image is hard at every timestep, so most of a reward's variance does not depend on the
    choice: 85% on CIFAR-10 among timesteps up to 200. Labelled images are few and reappear; their
    earlier rewards do not depend on the current choice, so as a baseline they leave the expected
    policy gradient unchanged and lower its variance (Williams 1992). A critic of the context cannot
    replace it, as it does not know the label.

    Rewards count relative to the running mean of all images (of which the present rewards are 1%
    after 100 updates), and each image's mean starts with one reward of 0.

    Args:
        images: number of images that can reappear.
    """

    own: Tensor
    visits: Tensor

    def __init__(self, images: int) -> None:
        super().__init__()
        self.all = RunningScale()
        self.register_buffer("own", torch.zeros(images))
        self.register_buffer("visits", torch.zeros(images, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, positions: Tensor, rewards: Tensor) -> Tensor:
        """Subtract each image's baseline from its reward, then update the baselines.

        Args:
            positions: (N,) int64, the image of each reward, 0 to images - 1; -1 for an unknown
                image, whose baseline is the mean of all images.
            rewards: (N,) float32.

        Returns:
            (N,) float32.
        """
        self.all.update(rewards)
        above = rewards - self.all.mean
        known = positions >= 0
        owners = positions[known]
        less = above.clone()
        less[known] -= self.own[owners]
        images, which, counts = torch.unique(owners, return_inverse=True, return_counts=True)
        sums = above.new_zeros(len(images)).index_add(0, which, above[known])
        self.visits[images] += counts
        rate = (counts / (self.visits[images] + 1)).clamp(min=FORGETTING)
        self.own[images] += rate * (sums / counts - self.own[images])
        return less
