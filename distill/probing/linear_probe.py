"""How much a teacher's features know of the labels: a linear probe on top of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
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
        device: Where features and targets come, and the sums are kept.
    """

    def __init__(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.count, self.classes = 0, classes
        self.x = torch.zeros(channels, dtype=torch.float64, device=device)
        self.y = self.x.new_zeros(classes)
        self.xx = self.x.new_zeros(channels, channels)
        self.xy = self.x.new_zeros(channels, classes)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add examples. features: (N, C), targets: (N,) int64 in 0..K-1."""
        x, y = features.double(), F.one_hot(targets, self.classes).double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def add(self, other: Self) -> None:
        """Add the examples that another one has seen."""
        self.count += other.count
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs

    def _sums(self) -> tuple[Tensor, ...]:
        return self.x, self.y, self.xx, self.xy

    def solve(self, penalty: float = 0.01) -> tuple[Tensor, Tensor]:
        """Weight (C, K) and bias (K,), float64: the class of x is the largest of x W + b.

        Args:
            penalty: Beside the mean squared error, on weights of channels of variance 1.
        """
        mean, covariance, spread = self._moments()
        base = self.y / self.count
        correlation = covariance / torch.outer(spread, spread)
        slope = (self.xy / self.count - torch.outer(mean, base)) / spread[:, None]
        ridge = penalty * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        weight = torch.linalg.solve(correlation + ridge, slope) / spread[:, None]
        return weight, base - mean @ weight

    def effective_rank(self) -> float:
        """Number of directions in which the features vary: see `effective_rank`."""
        _, covariance, spread = self._moments()
        varying = spread.isfinite()
        return effective_rank(covariance[varying][:, varying])

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), covariance (C, C), and standard deviation (C,), inf for a constant channel."""
        if not self.count:
            raise UserError("there are no labelled examples for the probe")
        mean = self.x / self.count
        covariance = self.xx / self.count - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp(min=0).sqrt()
        # A channel that is constant but for rounding says nothing.
        spread[spread <= 1e-6 * (self.xx.diagonal() / self.count).sqrt()] = torch.inf
        return mean, covariance, spread


class Logistic(Ridge):
    """Multinomial logistic regression on the same standardised channels, by L-BFGS.

    It has no closed form, so that it keeps its examples: for pooled features.
    """

    def __init__(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(channels, classes, device)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, targets: Tensor) -> None:
        super().update(features, targets)
        self.kept.append((features, targets))

    def add(self, other: Self) -> None:
        super().add(other)
        self.kept += other.kept

    def solve(self, penalty: float = 0.01) -> tuple[Tensor, Tensor]:
        """Weight (C, K) and bias (K,), float64, of the logits x W + b.

        Args:
            penalty: Half of it beside the mean cross-entropy, on the squares of the weights of
                channels of variance 1.
        """
        mean, _, spread = self._moments()
        x = torch.cat([features for features, _ in self.kept]).double()
        x = F.pad((x - mean) / spread, (0, 1), value=1.0)  # the last weight is the bias
        y = F.one_hot(torch.cat([targets for _, targets in self.kept]), self.classes).double()
        shape = x.shape[1], self.classes
        penalties = torch.full((shape[0], 1), penalty, dtype=x.dtype, device=x.device)
        penalties[-1] = 0

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weight = torch.as_tensor(flat, device=x.device).reshape(shape)
            logs = (x @ weight).log_softmax(1)
            loss = -(y * logs).sum(1).mean() + (penalties * weight.square()).sum() / 2
            gradient = x.T @ (logs.exp() - y) / len(x) + penalties * weight
            return loss.item(), gradient.flatten().cpu().numpy()

        found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B")
        weight = torch.as_tensor(found.x, device=x.device).reshape(shape)
        scaled = weight[:-1] / spread[:, None]
        return scaled, weight[-1] - mean @ scaled


def effective_rank(covariance: Tensor) -> float:
    """The exponential of the entropy of the eigenvalues' shares, 1 to C; 0 without any variance.

    Roy and Vetterli 2007 define it so of a matrix's singular values; here it is that of features
    over a data set, by their variance in each direction.

    Args:
        covariance: (C, C).
    """
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    if not values.sum() > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


class Labelled(NamedTuple):
    """The labelled examples of a batch: pooled images, or positions of a map."""

    features: Tensor
    """(N, C) float32."""
    classes: Tensor
    """(N,) int64."""
    images: Tensor
    """(N,) int64: which of the batch's images each belongs to."""


def labelled(feature_map: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Labelled:
    """The examples for a probe, on the feature map's device.

    Args:
        feature_map: (B, C, h, w).
        targets: (B,) classes: of the map's global average; or (B, H, W) masks: of every position,
            with the mask's nearest pixel.
        ignore_index: Targets of this value are left out.
    """
    batch, _, height, width = feature_map.shape
    targets = targets.to(feature_map.device)
    images = torch.arange(batch, device=feature_map.device)
    if targets.ndim == 1:
        x = feature_map.mean((2, 3))
    else:
        masks = targets[:, None].float()
        targets = F.interpolate(masks, (height, width), mode="nearest-exact").long().flatten()
        x = feature_map.permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)
        images = images.repeat_interleave(height * width)
    known = targets != ignore_index
    return Labelled(x[known], targets[known], images[known])


def probe_score(counts: Tensor, dense: bool) -> float:
    """mIoU of masks (`dense`), top-1 of images; in [0, 1]. counts: of a `ConfusionMatrix`."""
    return segmentation_scores(counts).miou if dense else classification_scores(counts).top1


def linear_probe(
    teacher: Teacher,
    train: Batches,
    val: Batches,
    *,
    timestep: int,
    classes: int,
    dense: bool,
    ignore_index: int = IGNORE_INDEX,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Fit a ridge regression on the features of a teacher's first layer, and score it.

    For classification on their global average: the score is top-1. For segmentation (`dense`) at
    every position of the map, with the mask's nearest pixel: the score is the mIoU there.

    Args:
        teacher: On `device`.
        train: Batches of images (B, 3, H, W) in [0, 1] and targets, (B,) or (B, H, W) int64, where
            `ignore_index` is left out.
        val: Batches to score.
        timestep: Of all images.
        classes: Number of classes.
        dense: Whether targets are masks.
        ignore_index: The target of what has no label.
        device: Where the features are computed.
        seed: Of the noise; equal ones show equal images to two teachers.

    Returns:
        A share in [0, 1].

    Raises:
        UserError: No example of train has a label.
    """
    layer, generator = teacher.layers[0], torch.Generator().manual_seed(seed)

    def look(images: Tensor, targets: Tensor) -> Labelled:
        timesteps = torch.full((len(images),), timestep)
        maps = teacher.features(images.to(device), timesteps, generator)
        return labelled(maps[layer], targets, ignore_index)

    ridge = Ridge(teacher.channels[layer], classes, device)
    for images, targets in train:
        seen = look(images, targets)
        ridge.update(seen.features, seen.classes)
    weight, bias = ridge.solve()
    matrix = ConfusionMatrix(classes, ignore_index, device)
    for images, targets in val:
        seen = look(images, targets)
        matrix.update((seen.features.double() @ weight + bias).argmax(1), seen.classes)
    return probe_score(matrix.counts, dense)
