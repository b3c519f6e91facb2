"""A known student scores as counted by hand."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.benchmarks import Task
from distill.errors import UserError
from distill.evaluation import counting as evaluation
from distill.evaluation.counting import count, predicted_classes


def benchmark(task: Task, classes: int) -> Any:
    return SimpleNamespace(
        name="tiny",
        task=task,
        num_classes=classes,
        class_names=tuple("abcdef"[:classes]),
        ignore_index=255,
        palette=np.zeros((classes, 3), dtype=np.uint8),
    )


def evaluate(
    student: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    examples: Any,
    kind: Any,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    **options: Any,
) -> dict[str, Any]:
    (tally,) = count(lambda images: [student(images)[0]], examples, kind, **options)
    return tally.scores(total)


def bright_or_dark(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two classes at half resolution: class 1 where red is above a half."""
    red = torch.nn.functional.avg_pool2d(images[:, :1], 2) - 0.5
    return torch.cat([-red, red, torch.full_like(red, -9.0)], dim=1), {}


def halves(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An 8x8 image, dark left and bright right; its mask in another size, top row void."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, 4:] = 255
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[:, width // 2 :] = 1
    mask[0] = 255
    return image, mask


def test_predictions_are_scored_at_each_masks_own_size() -> None:
    done: list[int] = []
    examples = [halves(16, 16), halves(32, 24), halves(8, 8)]
    examples[2][1][1:3, 0] = 1  # two pixels of 8 * 7 that the student gets wrong
    scores = evaluate(
        bright_or_dark, examples, benchmark("segmentation", 3), batch=2, progress=done.append
    )
    left, right = 15 * 8 + 31 * 12 + 7 * 4, 15 * 8 + 31 * 12 + 7 * 4
    a, b = (left - 2) / left, right / (right + 2)
    assert scores["iou"] == {"a": pytest.approx(a), "b": pytest.approx(b), "c": None}
    assert scores["miou"] == pytest.approx((a + b) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(1 - 2 / (left + right))
    assert done == [2, 1]
    json.loads(json.dumps(scores, allow_nan=False))


def test_images_of_several_sizes_may_stand_in_one_batch() -> None:
    large = torch.nn.functional.interpolate(halves(8, 8)[0][None], (16, 24))[0]
    examples = [halves(8, 8), (large, halves(16, 24)[1]), halves(8, 8)]
    shapes: list[tuple[int, ...]] = []

    def student(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shapes.append(tuple(images.shape))
        return bright_or_dark(images)

    scores = evaluate(student, examples, benchmark("segmentation", 3), batch=3)
    assert shapes == [(2, 3, 8, 8), (1, 3, 16, 24)]
    assert scores["pixel_accuracy"] == 1.0


def test_classification_scores_top1() -> None:
    def student(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return images.mean((2, 3)), {}

    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    examples = [(red, 0), (red.roll(1, 0), 1), (red, 1), (red, 255)]
    scores = evaluate(student, examples, benchmark("classification", 3))
    assert scores == {
        "top1": pytest.approx(2 / 3),
        "mean_accuracy": 0.75,
        "accuracy": {"a": 1.0, "b": 0.5, "c": None},
    }


def test_the_last_class_of_a_benchmark_without_void_counts() -> None:
    def student(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return images.mean((2, 3)), {}

    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    kind = benchmark("classification", 3)
    kind.ignore_index = -1
    scores = evaluate(student, [(blue, 2), (blue, 0)], kind)
    assert scores == {
        "top1": 0.5,
        "mean_accuracy": 0.5,
        "accuracy": {"a": 0.0, "b": None, "c": 1.0},
    }


def test_processes_share_the_examples_and_sum_their_counts() -> None:
    examples = [halves(16, 16), halves(32, 24), halves(8, 8)]
    examples[1][1][5] = 0
    kind = benchmark("segmentation", 3)
    counts: dict[int, Tensor] = {}  # of the matrix, and of the one with boundaries

    def collect(part: Tensor) -> Tensor:
        counts[part.ndim] = counts.get(part.ndim, 0) + part
        return counts[part.ndim]

    evaluate(bright_or_dark, examples, kind, rank=0, world=2, total=collect)
    together = evaluate(bright_or_dark, examples, kind, rank=1, world=2, total=collect)
    assert together == evaluate(bright_or_dark, examples, kind)


def test_no_gradient_is_kept() -> None:
    seen: list[bool] = []

    def student(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(torch.is_grad_enabled())
        return bright_or_dark(images)

    evaluate(student, [halves(8, 8)], benchmark("segmentation", 3))
    assert seen == [False]


def test_split_of_void_alone_is_refused() -> None:
    image, mask = halves(8, 8)
    with pytest.raises(UserError, match="no labelled pixels"):
        evaluate(bright_or_dark, [(image, mask.fill_(255))], benchmark("segmentation", 3))


@pytest.mark.parametrize("size", [(37, 23), (5, 40), (7, 11)])
def test_strips_of_rows_have_the_classes_of_the_whole(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0))
    whole = predicted_classes(logits, size)
    monkeypatch.setattr(evaluation, "LARGEST_LOGITS", 5 * size[1] * 3)  # three rows at once
    assert torch.equal(predicted_classes(logits, size), whole)


def test_logits_are_resized_before_the_best_class_is_taken() -> None:
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])  # classes cross at 1/3 from the right
    assert predicted_classes(logits, (1, 12)).tolist() == [[0] * 7 + [1] * 5]
