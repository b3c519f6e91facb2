"""The k-NN protocol: the class of the most similar labelled images, without any training.

Weighted votes as in DINO (Caron et al. 2021; Wu et al. 2018): each of the k nearest, by cosine,
votes with exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.evaluation.backbones import Backbone


def pooled(backbone: Backbone, images: Tensor) -> Tensor:
    """Global averages of all maps, each of length 1, side by side and of length 1 in all.

    images: (B, 3, H, W) in [0, 1] -> (B, D).
    """
    parts = [F.normalize(x.mean((2, 3)), dim=1) for x in backbone.maps(images).values()]
    return F.normalize(torch.cat(parts, dim=1), dim=1)


class NearestNeighbours:
    """A classifier that remembers the features of labelled images.

    Args:
        backbone: Whose features.
        batches: Images (B, 3, H, W) and classes (B,) int64, on the backbone's device.
        classes: K.
        neighbours: k; all images where there are fewer.
        temperature: Smaller ones let the nearest decide.
    """

    def __init__(
        self,
        backbone: Backbone,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        classes: int,
        neighbours: int,
        temperature: float,
    ) -> None:
        self.backbone, self.temperature = backbone, temperature
        seen = [(pooled(backbone, images), targets) for images, targets in batches]
        self.features = torch.cat([features for features, _ in seen])  # (N, D)
        self.targets = torch.cat([targets for _, targets in seen])  # (N,)
        self.classes = classes
        self.neighbours = min(neighbours, len(self.features))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> log of each class's share of the votes, (B, K)."""
        found = (pooled(self.backbone, images) @ self.features.T).topk(self.neighbours, dim=1)
        weights = (found.values / self.temperature).softmax(1)  # (B, k)
        shares = weights.new_zeros(len(images), self.classes)
        shares.scatter_add_(1, self.targets[found.indices], weights)
        return shares.clamp(min=1e-12).log()
