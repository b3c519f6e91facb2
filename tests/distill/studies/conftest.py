"""A small study, and runs of it that were never trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.studies.study import Cell, Study, run_folder
from distill.training.loop import checkpoint_path

Write = Callable[..., Path]

BINS = {"timesteps": [0, 100], "noise_fraction": [0.0, 0.1]}
ARMS = [
    {"name": "scratch", "overrides": ["train.arms=[scratch]"]},
    {"name": "a2c"},
    {"name": "uniform", "overrides": ["policy.name=uniform"], "seeds": [0]},
]


@pytest.fixture
def write(recipe: Path) -> Write:
    """A study of the tiny recipe, with what a test changes in it."""

    def written(**changes: Any) -> Path:
        tree = {
            "recipe": recipe.name,
            "seeds": [0, 1],
            "baselines": ["scratch", "uniform"],
            "overrides": ["train.arms=[distilled]", "train.steps=2"],
            "arms": ARMS,
        }
        path = recipe.parent / "small.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return path

    return written


def fake_runs(study: Study, scores: dict[tuple[str, int], float]) -> None:
    """Put finished runs with these scores in the study's folders."""
    for (arm, seed), score in scores.items():
        folder, take = run_folder(study.cells[Cell(arm, seed)]), study.takes[arm]
        result = {
            "scores": {"miou": score},
            "seconds": 10.0 + seed,
            "images_per_second": 50.0,
            "commit": "c0ffee",
            "hardware": "a machine",
            "policy": BINS if arm == "a2c" else None,
            "teacher_images": 0,
            "parts": {},
            "flops": {"student": 1, "teacher": None, "teacher_whole": None},
            "data": {"train": "a", "scored": "b"},
            "teacher": None,
        }
        late = {"probabilities": [0.25, 0.75], "entropy": 0.56, "effective_arms": 1.75}
        late |= {"name": arm, **BINS, "mean_reward": None}
        summary = {"name": folder.name, "seed": seed, "date": "2026-01-01", "student": "student"}
        summary |= {"task": "segmentation", "benchmark": "shapes", "split": "test"}
        summary |= {"metrics": {take: {"miou": score}}, "policy": late if arm == "a2c" else None}
        summary |= {"noise_floor": None, "commit": "c0ffee", "hardware": "a machine"}
        path = checkpoint_path(folder, take).with_name("result.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
        (folder / "summary.json").write_text(json.dumps(summary | {"wall_seconds": 20.0 + seed}))
