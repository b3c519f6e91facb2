"""The distilled arm of a tiny recipe whose teacher's features are cached."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.build import build_accelerator, build_training_set
from distill.config import RunConfig
from distill.training.loop import batches
from distill.training.trainer import Trainer

# 8 images x 2 flips x 2 bins: most of 12 steps of 8 images find their features in the cache
SMALL = [
    "data.augment=flip",
    "data.options.train=8",
    "data.labelled=4",
    "data.unlabelled=8",
    "policy.bins=2",
    "train.steps=12",
    "train.arms=[distilled]",
]


def build(config: RunConfig) -> Trainer:
    """The distilled arm, its cache open."""
    data = build_training_set(config.data)
    trainer = Trainer(config, "distilled", data, build_accelerator(config.device))
    trainer.open_cache()
    return trainer


def losses(trainer: Trainer) -> list[tuple[float, ...]]:
    """Of every step: task, feature and reward head, and the rewards."""
    found = []
    stream = batches(trainer)
    for _ in range(trainer.config.train.steps):
        step = trainer.train_step(next(stream))
        rewards = step.rewards["teacher_task"]
        scalars = (step.task, step.feature, step.reward_head, *rewards)
        found.append(tuple(x.item() for x in scalars))
    return found


@pytest.fixture
def cached(tmp_path: Path) -> list[str]:
    """Overrides of the tiny recipe: a small data set, and a cache."""
    return [*SMALL, f"teacher.cache={tmp_path / 'cache'}"]
