"""Counting, apart from scoring: one int64 confusion matrix over a whole split, then its scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.benchmarks import IGNORE_INDEX

TITLES = {"miou": "mIoU", "top1": "top-1", "nme": "NME"}
"""Names of the main scores in tables and pictures."""
ERRORS = frozenset({"rmse", "abs_rel"})
"""Errors that have a unit; all other figures are shares."""
LOWER_IS_BETTER = ERRORS | {"nme", "failure_rate"}
"""Scores that are better when lower; all code that compares uses this or `more_is_better`."""


def more_is_better(metric: str, value: float) -> float:
    """The figure, or of one that is better when it is lower its negative: more is better."""
    return -value if metric in LOWER_IS_BETTER else value


def in_points(metric: str) -> str:
    """The unit of a score in tables, and its direction if lower is better."""
    return "in points (lower is better)" if metric in LOWER_IS_BETTER else "in points"


def figure_text(name: str, value: float) -> str:
    """A figure for a table: a share in points, an error as it is."""
    return f"{value:.3f}" if name in ERRORS else f"{100 * value:.1f}"


class ConfusionMatrix:
    """Confusion matrix: `counts[truth, prediction]`, (C, C) int64.

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

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count classes against classes; integers of one shape: (B, H, W) masks, (B,) labels.

        Raises:
            ValueError: The shapes differ, or a value is not a class.
        """
        _check_shapes(predictions, targets)
        known = targets != self.ignore_index
        truth, guess = targets[known].long(), predictions[known].long()
        _check_classes("prediction", guess, self.num_classes)
        _check_classes("target", truth, self.num_classes)
        cells = truth * self.num_classes + guess
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))


def _check_shapes(predictions: Tensor, targets: Tensor) -> None:
    if predictions.shape != targets.shape:
        raise ValueError(f"shapes differ: {tuple(predictions.shape)} and {tuple(targets.shape)}")


def _check_classes(name: str, values: Tensor, num_classes: int, rows: int | None = None) -> None:
    """Unchecked, a stray value would be counted in another class's cell; of `rows` rows, all that
    lies in one of them shows afterwards."""
    if not values.numel():
        return
    least = 0 if values.dtype == torch.uint8 else int(values.min())
    most = int(values.max())
    if least < 0 or most >= (rows or num_classes):
        wrong = least if least < 0 else most
        raise ValueError(f"{name} {wrong} is not a class from 0 to {num_classes - 1}")


class BoundaryMatrix:
    """Counts for the boundary IoU of every class (Cheng et al., CVPR 2021), with all pixels.

    The boundary of a class is its pixels that erosion with a 3x3 square takes away in d steps; what
    lies outside of the image counts as another class. d is 2% of the image's diagonal (the paper's
    dilation ratio, 0.02), at least 1. All classes are eroded at once: a pixel is left where its
    square of side 2 d + 1 holds one class alone.

    `counts[truth, prediction, on]`, (C, C, 4) int64; `on` is 1 on the boundary of the true class
    alone, 2 on that of the predicted one alone, 3 on both, 0 on none. Their sum over `on` is the
    confusion matrix. Add those of several processes and score the sum.

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
        shape = (num_classes, num_classes, 4)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Count one image. predictions, targets: (H, W), classes.

        Returns:
            The confusion matrix of this image alone, (C, C) int64.

        Raises:
            ValueError: The shapes differ, or a value is not a class.
        """
        _check_shapes(predictions, targets)
        # Also rows for values that are not classes: faster than excluding these pixels first.
        rows, columns = 256, 4 * self.num_classes
        _check_classes("prediction", predictions, self.num_classes)
        if targets.dtype != torch.uint8:
            _check_classes("target", targets, self.num_classes, rows)
        predicted, truth = predictions.to(torch.uint8), targets.to(torch.uint8)
        # Beside a tensor, a comparison takes an eighth of the time that it takes beside a number.
        void = truth == truth.new_full(truth.shape[-1:], self.ignore_index)
        # What is predicted there is nobody's concern: else its edges would count beside it.
        on = boundaries(truth, void.view(torch.uint8).neg_().bitwise_or_(predicted))
        # The fewest bytes in the fewest passes: most of the time goes to memory.
        places = on.to(torch.uint8 if columns <= 2**8 else torch.int16).add_(predicted, alpha=4)
        cells = truth.to(torch.int16 if rows * columns <= 2**15 else torch.int32)
        cells = cells.mul_(columns).add_(places).flatten()
        counts = torch.bincount(cells, minlength=rows * columns).view(rows, self.num_classes, 4)
        if 0 <= self.ignore_index < rows:
            counts[self.ignore_index] = 0
        confusion = counts.sum(2)
        if confusion[self.num_classes :].any():
            stray = confusion.sum(1).nonzero().flatten()
            _check_classes("target", stray, self.num_classes)
        self.counts += counts[: self.num_classes]
        return confusion[: self.num_classes]


def boundary_iou(counts: Tensor) -> Tensor:
    """The boundary IoU of each class, (C,) float64, from the counts of a `BoundaryMatrix`."""
    matrix = counts.double().cpu()
    right = matrix[..., 3].diagonal()
    truth, predicted = matrix[..., [1, 3]].sum((1, 2)), matrix[..., [2, 3]].sum((0, 2))
    return right / (truth + predicted - right)


def boundaries(first: Tensor, second: Tensor) -> Tensor:
    """The pixels of all classes' boundaries, of two masks in the passes of one.

    first, second: (H, W) integers -> (H, W) uint8: 1 on a boundary of `first`, 2 of `second`, or
    their sum.
    """
    height, width = first.shape
    reach = max(1, round(0.02 * math.hypot(height, width)))
    on = torch.full_like(first, 3, dtype=torch.uint8)  # beyond the border is another class
    if min(height, width) > 2 * reach:
        # Elsewhere a square holds two classes where four neighbours in it do.
        in_row, in_column = _changes(first, second, 1), _changes(first, second, 0)
        corners = (in_row[1:] | in_column[:, 1:]).bitwise_or_(in_column[:, :-1])
        within = _any_within(_any_within(corners, 2 * reach, 1), 2 * reach, 0)
        on[reach : height - reach, reach : width - reach] = within
    return on


def _changes(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Where neighbours along `dim` differ: bits as in `boundaries`, one place less along `dim`."""
    size = first.shape[dim] - 1
    one, two = (
        (mask.narrow(dim, 1, size) != mask.narrow(dim, 0, size)).view(torch.uint8)
        for mask in (first, second)
    )
    return one.add_(two, alpha=2)


def _any_within(x: Tensor, length: int, dim: int) -> Tensor:
    """The bits that any of `length` neighbours has, `length` - 1 places less along `dim`: uint8,
    by doubling.
    """
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
    mean_accuracy: float
    """Mean of the classes' accuracies; chance, 1 / C, for a constant class."""
    accuracy: tuple[float, ...]
    """Share of each class's images that are right; NaN for a class without images."""


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
    accuracy = matrix.diagonal() / matrix.sum(1)
    return ClassificationScores(
        top1=(matrix.diagonal().sum() / matrix.sum()).item(),
        mean_accuracy=accuracy.nanmean().item(),
        accuracy=tuple(accuracy.tolist()),
    )
