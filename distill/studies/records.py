"""Checked readers of the files that a run leaves: summary.json, result.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from distill import checkpoint
from distill.benchmarks import Task
from distill.metrics import LOWER_IS_BETTER
from distill.tasks import TASKS

METRICS = {task: traits.metric for task, traits in TASKS.items()}

Least = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Some = Field(min_length=1)


class Bins(BaseModel):
    """The timesteps that a policy had on offer."""

    timesteps: Annotated[list[int], Some]
    noise_fraction: list[FiniteFloat]


class Policy(Bins):
    """The final preferences of a policy."""

    name: str
    probabilities: list[Least]
    entropy: FiniteFloat
    effective_arms: Least
    mean_reward: FiniteFloat | None

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not len(self.timesteps) == len(self.probabilities) == len(self.noise_fraction):
            raise ValueError("timesteps, probabilities and noise_fraction must have equal lengths")
        return self


class Floor(BaseModel):
    """The target-noise floor by pair, and for each timestep."""

    mean: dict[str, FiniteFloat] = {}
    bins: dict[str, list[FiniteFloat | None]] = {}

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if self.mean and self.mean.keys() != self.bins.keys():
            raise ValueError("mean and bins must have the same pairs")
        if len({len(row) for row in self.bins.values()}) > 1:
            raise ValueError("the rows of bins must have equal lengths")
        return self


class Summary(BaseModel):
    """summary.json of a run."""

    name: str
    seed: int
    task: Task
    benchmark: str
    split: str
    metrics: Annotated[dict[str, dict[str, Any]], Some]
    policy: Policy | None
    noise_floor: Floor | None
    wall_seconds: Least
    student: str
    commit: str
    hardware: str
    date: str

    @model_validator(mode="after")
    def _scored(self) -> Self:
        metric = METRICS[self.task]
        for arm, scores in self.metrics.items():
            if not is_score(metric, scores.get(metric)):
                raise ValueError(f"metrics.{arm}.{metric} must be a score")
        return self


class Scores(BaseModel):
    """The scores of an arm by class."""

    iou: dict[str, FiniteFloat | None] = {}
    accuracy: dict[str, FiniteFloat | None] = {}


class FlopsRecord(BaseModel):
    """Of one image forward, None where that cannot be counted."""

    student: int
    teacher: int | None
    teacher_whole: int | None


class Fingerprints(BaseModel):
    """Of the images that an arm was trained and scored on."""

    train: str
    scored: str


class Result(BaseModel):
    """checkpoints/ARM/result.json of a run."""

    scores: Scores
    seconds: Least
    images_per_second: Least
    commit: str
    hardware: str
    teacher_images: int
    parts: dict[str, Least]
    flops: FlopsRecord
    policy: Bins | None = None
    noise_floor: Floor | None = None
    data: Fingerprints
    teacher: str | None

    @model_validator(mode="after")
    def _measured_at_all(self) -> Self:
        rows = self.noise_floor.bins.values() if self.noise_floor else ()
        if rows and (self.policy is None or len(next(iter(rows))) != len(self.policy.timesteps)):
            raise ValueError("noise_floor.bins must have one number per entry of policy.timesteps")
        return self


class _Room(BaseModel):
    """Possible gains at a layer: mean and 95% interval by way to choose."""

    __pydantic_extra__: dict[str, tuple[FiniteFloat, FiniteFloat, FiniteFloat]]
    model_config = ConfigDict(extra="allow")
    images: int
    fixed_timestep: int


class _Best(BaseModel):
    """The cell of the map that was chosen."""

    layer: str


class ProbeSettings(BaseModel):
    """Keys of the recipe and other things that decide the figures; these are among them."""

    model_config = ConfigDict(extra="allow")
    benchmark: str = Field(alias="data.benchmark")
    teacher: str = Field(alias="teacher (fingerprint)")


class ProbeFigures(BaseModel):
    """probe.json of a probe, as far as a report reads it."""

    settings: ProbeSettings
    best: _Best
    head_room: dict[str, _Room]


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
