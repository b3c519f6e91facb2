"""How much a teacher's features know of the labels: a ridge regression on top of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks import IGNORE_INDEX
from distill.errors import UserError
from distill.metrics import ConfusionMatrix, classification_scores, segmentation_scores
from teachers.protocol import Teacher

Batches = Iterable[tuple[Tensor, Tensor]]


class Ridge:
    """Linear regression of one-hot classes with an L2 penalty (Hoerl and Kennard 1970), in float64,
    from sums alone: the features of a whole data set need not be kept.

    Channels are standardised, so that neither their scale nor their offset counts: two networks
    can be compared with one penalty.

    Args:
        channels: C of the features.
        classes: K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        self.count, self.classes = 0, classes
        self.x = torch.zeros(channels, dtype=torch.float64)
        self.y = torch.zeros(classes, dtype=torch.float64)
        self.xx = torch.zeros(channels, channels, dtype=torch.float64)
        self.xy = torch.zeros(channels, classes, dtype=torch.float64)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add examples. features: (N, C), targets: (N,) int64 in 0..K-1; on the CPU."""
        x, y = features.double(), F.one_hot(targets, self.classes).double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, penalty: float = 0.01) -> tuple[Tensor, Tensor]:
        """Weight (C, K) and bias (K,), float64: the class of x is the largest of x W + b.

        Args:
            penalty: Beside the mean squared error, on weights of channels of variance 1.
        """
        if not self.count:
            raise UserError("there is no labelled example for the probe")
        mean, base = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp(min=0).sqrt()
        # A channel that is constant but for rounding says nothing.
        constant = spread <= 1e-6 * (self.xx.diagonal() / self.count).sqrt()
        spread[constant] = torch.inf
        correlation = covariance / torch.outer(spread, spread)
        slope = (self.xy / self.count - torch.outer(mean, base)) / spread[:, None]
        ridge = penalty * torch.eye(len(mean), dtype=torch.float64)
        weight = torch.linalg.solve(correlation + ridge, slope) / spread[:, None]
        return weight, base - mean @ weight


def linear_probe(
    teacher: Teacher,
    train: Batches,
    val: Batches,
    *,
    timestep: int,
    classes: int,
    dense: bool,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Fit a ridge regression on the features of a teacher's first layer, and score it.

    For classification on their global average: the score is top-1. For segmentation (`dense`) at
    every position of the map, with the mask's nearest pixel: the score is the mIoU there.

    Args:
        teacher: On `device`.
        train: Batches of images (B, 3, H, W) in [0, 1] and targets, (B,) or (B, H, W) int64, where
            `IGNORE_INDEX` is left out.
        val: The same, to be scored.
        timestep: Of all images.
        classes: Number of classes.
        dense: Whether targets are masks.
        device: Where the features are computed.
        seed: Of the noise; equal ones show equal images to two teachers.

    Returns:
        A share in [0, 1].

    Raises:
        UserError: No example of train has a label.
    """
    ridge = Ridge(teacher.channels[teacher.layers[0]], classes)
    generator = torch.Generator().manual_seed(seed)
    for features, targets in _labelled(teacher, train, timestep, device, generator):
        ridge.update(features, targets)
    weight, bias = ridge.solve()
    matrix = ConfusionMatrix(classes)
    for features, targets in _labelled(teacher, val, timestep, device, generator):
        matrix.update((features.double() @ weight + bias).argmax(1), targets)
    if dense:
        return segmentation_scores(matrix.counts).miou
    return classification_scores(matrix.counts).top1


def _labelled(
    teacher: Teacher,
    batches: Batches,
    timestep: int,
    device: torch.device | str,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (N, C) float32 and classes (N,) int64 of what has a label, on the CPU."""
    for images, targets in batches:
        timesteps = torch.full((len(images),), timestep)
        x = teacher.features(images.to(device), timesteps, generator)[teacher.layers[0]].cpu()
        if targets.ndim == 1:
            x = x.mean((2, 3))
        else:
            masks = targets[:, None].float()
            targets = F.interpolate(masks, x.shape[-2:], mode="nearest-exact").long().flatten()
            x = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)
        labelled = targets != IGNORE_INDEX
        yield x[labelled], targets[labelled]
