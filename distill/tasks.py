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
    """Of one task."""

    metric: str
    """The score that students are chosen and compared by (`metrics.TITLES`)."""
    labels: str
    """What the labels are, for error lines."""
    dense: bool
    """Whether a student predicts at every position, in place of once an image."""
    classes: bool = True
    """Whether labels are classes; otherwise they are places in the image, which a student shows as
    heat maps, and which the reward head predicts as coordinates, from the pooled feature."""


TASKS: Mapping[Task, Traits] = MappingProxyType(
    {
        "segmentation": Traits("miou", "masks", dense=True),
        "classification": Traits("top1", "classes of whole images", dense=False),
        "landmarks": Traits("nme", "landmarks", dense=True, classes=False),
    }
)


def traits(benchmark: Benchmark) -> Traits:
    """Of a benchmark that has labels; a UserError where it has none."""
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
    """Targets of the shape in which training sees them, of `count` images of (H, W)."""
    if not traits(benchmark).classes:
        return torch.zeros(count, benchmark.num_classes, 2)
    return torch.zeros(count, *(size if traits(benchmark).dense else ()), dtype=torch.int64)
