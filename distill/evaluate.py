"""Evaluation: a student's predictions on a whole split, one confusion matrix, its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks import Benchmark, Examples
from distill.data import as_float
from distill.errors import UserError
from distill.metrics import ConfusionMatrix, classification_scores, segmentation_scores

Student = Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]]


def evaluate(
    student: Student,
    examples: Examples,
    benchmark: Benchmark,
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Score a student on a split.

    Args:
        student: Images (B, 3, H, W) in [0, 1] to logits, (B, C) or (B, C, h, w), and feature maps;
            in eval mode already.
        examples: Images (3, H, W) uint8 of one size. Masks keep their own sizes: the logits are
            resized to them (bilinear), so that scores do not depend on the student's resolution.
        benchmark: Says the task and the classes.
        device: Where the student is.
        batch: Images a forward pass.
        rank: This process, which takes every `world`-th example.
        world: Number of processes.
        total: Sums a tensor over the processes.
        progress: Called with the number of images done after each batch.

    Returns:
        Shares in [0, 1]: `miou`, `mean_accuracy`, `pixel_accuracy` and `iou`, or `top1` and
        `accuracy`; the last of each by class name, None for a class that does not occur.
    """
    matrix = ConfusionMatrix(benchmark.num_classes, benchmark.ignore_index, device)
    indices = range(rank, len(examples), world)
    for start in range(0, len(indices), batch):
        items = [examples[index] for index in indices[start : start + batch]]
        images = as_float(torch.stack([image for image, _ in items]).to(device))
        with torch.no_grad():
            logits = student(images)[0].float()
        for scores, (_, target) in zip(logits, items, strict=True):
            truth = torch.as_tensor(target, device=device)
            matrix.update(predicted_classes(scores, tuple(truth.shape)), truth)
        progress(len(items))
    counts = total(matrix.counts)
    if counts.sum() == 0:
        raise UserError(f"{benchmark.name}: the split has no labelled pixel or image to score")
    names = benchmark.class_names
    if benchmark.task == "classification":
        of_images = classification_scores(counts)
        return {**of_images._asdict(), "accuracy": _by_name(names, of_images.accuracy)}
    of_pixels = segmentation_scores(counts)
    return {**of_pixels._asdict(), "iou": _by_name(names, of_pixels.iou)}


def predicted_classes(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """The best class. logits: (C,) -> (), or (C, h, w) -> `size` = (H, W); int64."""
    if size:
        logits = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    return logits.max(0).indices  # argmax over a leading dimension takes ten times as long


def _by_name(names: tuple[str, ...], shares: tuple[float, ...]) -> dict[str, float | None]:
    # None, because JSON has no NaN.
    pairs = zip(names, shares, strict=True)
    return {name: None if math.isnan(share) else share for name, share in pairs}
