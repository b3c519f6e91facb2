"""Counting, apart from scoring: one int64 confusion matrix over a whole split, then its scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks import IGNORE_INDEX

TITLES = {"miou": "mIoU", "top1": "top-1"}
"""The main scores, as tables and pictures call them."""
ERRORS = frozenset({"rmse", "abs_rel"})
"""Figures that are better when they are small; they are no shares."""


def figure_text(name: str, value: float) -> str:
    """A figure for a table: a share in points, an error as it is."""
    return f"{value:.3f}" if name in ERRORS else f"{100 * value:.1f}"


class ConfusionMatrix:
    """How often each class was taken for each: `counts[truth, prediction]`, (C, C) int64.

    The counts are a plain tensor: add those of several processes and score the sum.

    Args:
        num_classes: C.
        ignore_index: Targets of this value are not counted; a negative one means that all are.
        device: Where the counts are kept; predictions and targets are on the same device.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Count classes against classes; integers of one shape: (B, H, W) masks, (B,) labels.

        Returns:
            The counts of these alone.

        Raises:
            ValueError: The shapes differ, or a value is not a class.
        """
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)}"
            )
        self._check("prediction", predictions, self.num_classes)
        self._check("target", targets, None)
        # Rows for values that are no classes too: faster than to leave these pixels out before.
        rows = max(self.num_classes, int(targets.max()) + 1 if targets.numel() else 0)
        counts = _joint_counts(targets, predictions, rows, self.num_classes)
        if 0 <= self.ignore_index < rows:
            counts[self.ignore_index] = 0
        stray = counts.sum(1).nonzero().flatten()
        self._check("target", stray, self.num_classes)
        counts = counts[: self.num_classes]
        self.counts += counts
        return counts

    def _check(self, name: str, values: Tensor, limit: int | None) -> None:
        """Unchecked, a stray value would be counted in another class's cell."""
        if values.numel() and (values.min() < 0 or (limit is not None and values.max() >= limit)):
            wrong = int(values.min() if values.min() < 0 else values.max())
            raise ValueError(f"{name} {wrong} is not a class, 0 to {self.num_classes - 1}")


def _joint_counts(first: Tensor, second: Tensor, rows: int, columns: int) -> Tensor:
    """How often each pair of values occurs, (rows, columns) int64. Integers of one shape."""
    # The fewest bytes in the fewest copies: at a megabyte the memory's pages take most of the time.
    cells = first.to(torch.int16 if rows * columns < 2**15 else torch.int32, copy=True)
    cells = cells.mul_(columns).add_(second).flatten()
    return torch.bincount(cells, minlength=rows * columns).reshape(rows, columns)


class BoundaryMatrix:
    """Counts for the boundary IoU of every class (Cheng et al., CVPR 2021).

    The boundary of a class is its pixels that erosion with a 3x3 square takes away in d steps; what
    lies outside of the image counts as another class. d is 2% of the image's diagonal (the paper's
    dilation ratio, 0.02), at least 1. All classes are eroded at once: a pixel is left where its
    square of side 2 d + 1 holds one class alone.

    `counts[1 + truth, 1 + prediction]`, (C + 1, C + 1) int64; row and column 0 stand for all that
    is no boundary. Add those of several processes and score the sum.

    Args:
        num_classes: C, at most 255.
        ignore_index: Targets of this value are not counted, but are a class beside others, in
            truth and prediction alike.
        device: Where the counts are kept.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = IGNORE_INDEX,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        side = num_classes + 1
        self.counts = torch.zeros(side, side, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count one image. predictions, targets: (H, W), classes."""
        predicted, truth = predictions.to(torch.uint8), targets.to(torch.uint8)
        # Beside a tensor, a comparison takes an eighth of the time that it takes beside a number.
        known = truth != torch.full_like(truth, self.ignore_index)
        # What is predicted there is nobody's concern: else its edges would count beside it.
        predicted = torch.where(known, predicted, truth)
        truth = (truth + 1) * (boundary(truth) & known)
        predicted = (predicted + 1) * (boundary(predicted) & known)
        side = self.num_classes + 1
        self.counts += _joint_counts(truth, predicted, side, side)


def boundary_iou(counts: Tensor) -> Tensor:
    """The boundary IoU of each class, (C,) float64, from the counts of a `BoundaryMatrix`."""
    matrix = counts.double().cpu()
    right, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return (right / (truth + predicted - right))[1:]


def boundary(mask: Tensor, ratio: float = 0.02) -> Tensor:
    """The pixels of all classes' boundaries. mask: (H, W) integers -> (H, W) bool."""
    reach = max(1, round(ratio * math.hypot(*mask.shape)))
    # A square holds two classes where four neighbours in it do; beyond the border is another.
    in_row, in_column = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    corners = in_row[1:] | in_column[:, 1:] | in_column[:, :-1]
    corners = F.pad(corners, (1, 1, 1, 1), value=True)  # (H + 1, W + 1)
    return _any_within(_any_within(corners, 2 * reach, 1), 2 * reach, 0)


def _any_within(x: Tensor, length: int, dim: int) -> Tensor:
    """Whether any of `length` neighbours along `dim` is set, by doubling; outside none is.

    x: bool; length even -> one place less along `dim`, between those of x.
    """
    pad = length // 2 - 1
    x = F.pad(x, (pad, pad) if dim == 1 else (0, 0, pad, pad))
    reached = 1
    while reached < length:
        step = min(reached, length - reached)
        size = x.shape[dim] - step
        x = x.narrow(dim, 0, size) | x.narrow(dim, step, size)
        reached += step
    return x


class SegmentationScores(NamedTuple):
    """Shares in [0, 1]; NaN where there was nothing to score."""

    miou: float
    """Intersection over union, mean over the classes that occur in truth or prediction."""
    mean_accuracy: float
    """Share of a class's pixels found, mean over the classes that occur in truth."""
    pixel_accuracy: float
    """Share of all pixels that are right."""
    frequency_weighted_iou: float
    """Intersection over union, mean over the labelled pixels' classes (Long et al. 2015)."""
    iou: tuple[float, ...]
    """Intersection over union of each class; NaN for one absent from truth and prediction."""


class ClassificationScores(NamedTuple):
    """Shares in [0, 1]; NaN where there was nothing to score."""

    top1: float
    """Share of the images whose class is right."""
    accuracy: tuple[float, ...]
    """The same of each class; NaN for one without images."""


def segmentation_scores(counts: Tensor) -> SegmentationScores:
    """Score a confusion matrix. counts: (C, C) int64, truth in rows, prediction in columns."""
    matrix = counts.double().cpu()
    right, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = right / (truth + predicted - right)  # 0 / 0 = NaN: the class is absent
    return SegmentationScores(
        miou=iou.nanmean().item(),
        mean_accuracy=(right / truth).nanmean().item(),
        pixel_accuracy=(right.sum() / matrix.sum()).item(),
        frequency_weighted_iou=((truth * iou).nansum() / truth.sum()).item(),
        iou=tuple(iou.tolist()),
    )


def classification_scores(counts: Tensor) -> ClassificationScores:
    """Score a confusion matrix. counts: (C, C) int64, truth in rows, prediction in columns."""
    matrix = counts.double().cpu()
    right = matrix.diagonal()
    return ClassificationScores(
        top1=(right.sum() / matrix.sum()).item(),
        accuracy=tuple((right / matrix.sum(1)).tolist()),
    )
