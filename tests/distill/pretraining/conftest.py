"""A recipe for a teacher, and a training of it, so small that they take seconds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from distill.cli import main
from distill.pretraining.teach import TeacherTraining


def write_recipe(folder: Path) -> Path:
    """A teacher of two levels, 8 and 16 channels, trained for 5 steps on shapes of 32 px."""
    tree = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {"options": {"size": 32, "train": 12, "val": 6}, "augment": "flip"},
        "unet": {"block_out_channels": [8, 16]},
        "steps": 5,
        "batch": 4,
        "warmup": 1,
        "ema": 0.5,
        "log_every": 1,
        "checkpoint_every": 2,
        "samples": 4,
        "sample_steps": 2,
    }
    path = folder / "ddpm.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose runs lie in `tmp_path / "runs"`."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a teacher that was trained to its end; for reading only."""
    folder = tmp_path_factory.mktemp("taught")
    assert main(["teacher", "train", str(write_recipe(folder))]) == 0
    return folder / "runs" / "ddpm"


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C (a real SIGINT to this process) once, in a given step."""
    train_step = TeacherTraining.train_step

    def stepping(training: TeacherTraining, images: Tensor) -> Tensor:
        if training.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(training, images)

    monkeypatch.setattr(TeacherTraining, "train_step", stepping)


def photos(
    folder: Path, sizes: tuple[tuple[int, int], ...] = ((50, 40), (50, 40), (50, 40))
) -> None:
    """Images of noise, of these widths and heights, in a folder inside of `photos`."""
    (folder / "photos" / "deep").mkdir(parents=True)
    for number, size in enumerate(sizes):
        image = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "photos" / "deep" / f"{number}.png")


def card_of(run: Path) -> str:
    return (run / "pipeline" / "README.md").read_text()
