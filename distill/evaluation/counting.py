"""Evaluation: predictions on a whole split, counted in integers, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.augmentation import Item
from distill.benchmarks import Benchmark, Examples, LandmarkBenchmark
from distill.data import as_float, in_order
from distill.errors import UserError
from distill.landmarks import LandmarkTally, peaks
from distill.metrics import (
    BoundaryMatrix,
    ConfusionMatrix,
    boundary_iou,
    classification_scores,
    segmentation_scores,
)
from distill.tasks import traits
from distill.training.clock import Timed, untimed

Total = Callable[[Tensor], Tensor]
LARGEST_LOGITS = 2**26  # values of one image that are resized at once, 256 MiB


class Tally:
    """Counts of right and wrong predictions of one predictor on the examples so far.

    Args:
        benchmark: Says the task and the classes.
        device: Where the counts are kept.

    Attributes:
        counter: `metrics.BoundaryMatrix` of masks, `metrics.ConfusionMatrix` of classes.
        each: How good each image's prediction is, in [0, 1], in order: pixel accuracy, or the
            probability of the true class; NaN where nothing is labelled.
    """

    def __init__(self, benchmark: Benchmark, device: torch.device | str) -> None:
        self.benchmark, self.device = benchmark, device
        dense = benchmark.task == "segmentation"
        kind: type[BoundaryMatrix | ConfusionMatrix] = BoundaryMatrix if dense else ConfusionMatrix
        self.counter = kind(benchmark.num_classes, benchmark.ignore_index, device)
        self.each: list[Tensor] = []

    def update(self, logits: Tensor, guess: Tensor, truth: Tensor) -> None:
        """Count one image.

        Args:
            logits: (C,) or (C, h, w).
            guess: The class predicted, (), or classes (H, W).
            truth: The true class or classes, in the shape of `guess`.
        """
        if isinstance(self.counter, BoundaryMatrix):
            guess = guess.to(torch.uint8)  # small integers are counted several times faster
            counts = self.counter.update(guess, truth)
            self.each.append(counts.diagonal().sum() / counts.sum())
        else:
            self.counter.update(guess, truth)
            known = truth != self.benchmark.ignore_index
            self.each.append(logits.softmax(0)[truth.where(known, 0)].where(known, math.nan))

    @property
    def confusion(self) -> Tensor:
        """(C, C) int64, truth in rows, prediction in columns."""
        counts = self.counter.counts
        return counts.sum(2) if counts.ndim == 3 else counts

    def scores(self, total: Total = lambda counts: counts) -> dict[str, Any]:
        """Shares in [0, 1] over all that was counted.

        Args:
            total: Sums a tensor over the processes.

        Returns:
            Of masks `miou`, `mean_accuracy`, `pixel_accuracy`, `frequency_weighted_iou`,
            `boundary_iou` (the mean of the classes') and `iou`; of images `top1`, `mean_accuracy`
            and `accuracy`. The last of each is by class name, None for a class that does not occur.

        Raises:
            UserError: No pixel or image had a label.
        """
        counts = total(self.counter.counts)
        names = self.benchmark.class_names
        if counts.sum() == 0:
            name = self.benchmark.name
            raise UserError(f"{name}: the split has no labelled pixels or images to score")
        if self.benchmark.task == "classification":
            of_images = classification_scores(counts)
            return {**of_images._asdict(), "accuracy": _by_name(names, of_images.accuracy)}
        of_pixels = segmentation_scores(counts.sum(2))._asdict()
        of_classes = _by_name(names, of_pixels.pop("iou"))
        mean = boundary_iou(counts).nanmean().item()
        return {**of_pixels, "boundary_iou": mean, "iou": of_classes}


def count(
    predict: Callable[[Tensor], Sequence[Tensor]],
    examples: Examples,
    benchmark: Benchmark,
    *,
    candidates: int = 1,
    device: torch.device | str = "cpu",
    batch: int = 32,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] = lambda images: None,
    timed: Timed = untimed,
) -> list[Tally | LandmarkTally]:
    """Predict a split and count, for several predictors at once that share their features.

    Args:
        predict: Images (B, 3, H, W) in [0, 1] to the logits of each candidate, (B, C) or
            (B, C, h, w).
        examples: Images (3, H, W) uint8; of several sizes, those of a batch are grouped by size.
            Masks keep their own sizes: the logits are resized to them (bilinear), so that scores do
            not depend on the resolution of predictions.
        benchmark: Says the task and the classes.
        candidates: Number of predictors.
        device: Where images go.
        batch: Images per forward pass.
        workers: Processes that read them.
        rank: This process, which takes every `world`-th example.
        world: Number of processes.
        progress: Called with the number of images done after each batch.
        timed: Measures the parts `read`, `predict` and `score`.

    Returns:
        One tally per candidate.
    """
    # The few logits of an image of one class are copied once per batch: image by image a GPU waits.
    counted = torch.device("cpu" if benchmark.task == "classification" else device)
    tallies = [new_tally(benchmark, counted) for _ in range(candidates)]
    batches = in_order(examples, range(rank, len(examples), world), batch, workers)
    while True:
        with timed("read"):
            items = next(batches, None)
        if items is None:
            return tallies
        predictions: dict[int, list[Tensor]] = {}
        for indices in _by_size(items):
            with timed("predict"), torch.no_grad():
                images = as_float(torch.stack([items[index][0] for index in indices]).to(device))
                answers = [logits.float().to(counted) for logits in predict(images)]
                predictions |= {
                    index: [a[row] for a in answers] for row, index in enumerate(indices)
                }
        for index, (_, target) in enumerate(items):
            truth = torch.as_tensor(target).to(counted)
            for tally, logits in zip(tallies, predictions.pop(index), strict=True):
                with timed("predict"):
                    guess = predicted(logits, truth)
                with timed("score"):
                    tally.update(logits, guess, truth)
        progress(len(items))


def _by_size(items: Sequence[Item]) -> Iterator[list[int]]:
    """Indices of the items, grouped by the size of their images."""
    sizes = [tuple(image.shape) for image, _ in items]
    for size in dict.fromkeys(sizes):
        yield [index for index, other in enumerate(sizes) if other == size]


def new_tally(benchmark: Benchmark, device: torch.device | str) -> Tally | LandmarkTally:
    """The tally for a benchmark's task."""
    if traits(benchmark).classes:
        return Tally(benchmark, device)
    return LandmarkTally(cast(LandmarkBenchmark, benchmark), device)


def predicted(logits: Tensor, truth: Tensor) -> Tensor:
    """The prediction from one image's logits, in the form of its truth: class, classes or
    points."""
    return peaks(logits) if truth.is_floating_point() else predicted_classes(logits, truth.shape)


def predicted_classes(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """The best class. logits: (C,) -> (), or (C, h, w) -> `size` = (H, W); int64.

    Logits are resized (bilinear), those of large images some classes at a time.
    """
    if not size:
        return logits.argmax()
    at_once = max(1, LARGEST_LOGITS // math.prod(size))
    best, classes = logits.new_full(size, -math.inf), logits.new_zeros(size, dtype=torch.int64)
    for start in range(0, len(logits), at_once):
        some = logits[None, start : start + at_once]
        # `max`, as argmax over a leading dimension takes ten times as long
        values, indices = F.interpolate(some, size, mode="bilinear")[0].max(0)
        better = values > best
        best = torch.where(better, values, best)
        classes = torch.where(better, indices + start, classes)
    return classes


def _by_name(names: tuple[str, ...], shares: tuple[float, ...]) -> dict[str, float | None]:
    # None, because JSON has no NaN.
    pairs = zip(names, shares, strict=True)
    return {name: None if math.isnan(share) else share for name, share in pairs}
