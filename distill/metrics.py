"""Counting, apart from scoring: one int64 confusion matrix over a whole split, then its scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.benchmarks import IGNORE_INDEX


class ConfusionMatrix:
    """How often each class was taken for each: `counts[truth, prediction]`, (C, C) int64.

    The counts are a plain tensor: add those of several processes and score the sum.

    Args:
        num_classes: C.
        ignore_index: Targets of this value are not counted.
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
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)}"
            )
        labelled = targets != self.ignore_index
        truth, predicted = targets[labelled].long(), predictions[labelled].long()
        for name, classes in (("target", truth), ("prediction", predicted)):
            # Unchecked, a stray value would be counted in another class's cell.
            if classes.numel() and not 0 <= classes.min() <= classes.max() < self.num_classes:
                wrong = int(classes.max() if classes.min() >= 0 else classes.min())
                raise ValueError(f"{name} {wrong} is not a class, 0 to {self.num_classes - 1}")
        cells = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += cells.reshape(self.num_classes, self.num_classes)


class SegmentationScores(NamedTuple):
    """Shares in [0, 1]; NaN where there was nothing to score."""

    miou: float
    """Intersection over union, mean over the classes that occur in truth or prediction."""
    mean_accuracy: float
    """Share of a class's pixels found, mean over the classes that occur in truth."""
    pixel_accuracy: float
    """Share of all pixels that are right."""
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
