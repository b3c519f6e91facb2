"""The tasks, and what sets one apart from the others, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from distill.benchmarks import Benchmark, Task
from distill.errors import UserError, nearest


class Traits(NamedTuple):
    """What sets one task apart from the others."""

    metric: str
    """The score that students are chosen and compared by (`metrics.TITLES`)."""
    labels: str
    """Description of the labels, for error lines."""
    dense: bool
    """Whether a student predicts once per position instead of once per image."""
    classes: bool = True
    """Whether labels are classes; otherwise they are points in the image, which a student predicts
    as heat maps, and the reward head as coordinates from the pooled feature."""


TASKS: Mapping[Task, Traits] = MappingProxyType(
    {
        "segmentation": Traits("miou", "masks", dense=True),
        "classification": Traits("top1", "classes of whole images", dense=False),
        "landmarks": Traits("nme", "landmarks", dense=True, classes=False),
    }
)


def traits(benchmark: Benchmark) -> Traits:
    """The traits of a benchmark's task. Raises UserError if it has no labels."""
    if benchmark.task is None:
        raise UserError(
            f"data.benchmark: {benchmark.name!r} has no labels to score a student with; use it "
            "only for `distill teacher train`"
        )
    if benchmark.task not in TASKS:
        raise UserError(
            f"data.benchmark: {benchmark.name!r} has the unknown task {benchmark.task!r}; "
            f"{nearest(str(benchmark.task), TASKS)}"
        )
    return TASKS[benchmark.task]


def blank_targets(benchmark: Benchmark, count: int, size: tuple[int, int]) -> Tensor:
    """Targets for `count` images of (H, W) in the shape and dtype of training, all blank."""
    if not traits(benchmark).classes:
        return torch.zeros(count, benchmark.num_classes, 2)
    return torch.zeros(count, *(size if traits(benchmark).dense else ()), dtype=torch.int64)
