"""What a run leaves for others to read, and whether that is whole: summary.json, result.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from distill import checkpoint
from distill.benchmarks import Task
from distill.evaluation.metrics import LOWER_IS_BETTER
from distill.tasks import TASKS

METRICS = {task: traits.metric for task, traits in TASKS.items()}

Least = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Some = Field(min_length=1)


class Bins(BaseModel):
    """The timesteps that a policy had on offer."""

    timesteps: Annotated[list[int], Some]
    noise_fraction: list[FiniteFloat]


class Policy(Bins):
    """What a policy came to prefer."""

    name: str
    probabilities: list[Least]

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not len(self.timesteps) == len(self.probabilities) == len(self.noise_fraction):
            raise ValueError("timesteps, probabilities and noise_fraction have one length")
        return self


class Floor(BaseModel):
    """The target-noise floor by pair, and for each timestep."""

    mean: dict[str, FiniteFloat] = {}
    bins: dict[str, list[FiniteFloat | None]] = {}

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not self.mean.keys() <= self.bins.keys():
            raise ValueError("every pair of mean has a row in bins")
        return self


class Summary(BaseModel):
    """summary.json of a run."""

    task: Task
    benchmark: str
    split: str
    metrics: Annotated[dict[str, dict[str, Any]], Some]
    policy: Policy | None
    wall_seconds: Least

    @model_validator(mode="after")
    def _scored(self) -> Self:
        metric = METRICS[self.task]
        for arm, scores in self.metrics.items():
            if not is_score(metric, scores.get(metric)):
                raise ValueError(f"metrics.{arm}.{metric} is a score")
        return self


class Result(BaseModel):
    """checkpoints/ARM/result.json of a run."""

    scores: dict[str, Any]
    seconds: Least
    images_per_second: Least
    commit: str
    hardware: str
    policy: Bins | None = None
    noise_floor: Floor | None = None
    data: dict[str, str] = {}
    teacher: str | None = None


def is_score(metric: str, value: object) -> bool:
    """Whether it is a number that the metric can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    most = math.inf if metric in LOWER_IS_BETTER else 1
    return math.isfinite(value) and 0 <= value <= most


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a run. Raises UserError if it is missing or damaged."""
    return checkpoint.read_json(run / "summary.json", kind=Summary)


def read_result(path: Path) -> dict[str, Any]:
    """An arm's result.json. Raises UserError if it is missing or damaged."""
    return checkpoint.read_json(path, kind=Result)
