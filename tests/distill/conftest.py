"""A teacher, a recipe and runs so small that they take seconds, for the tests of whole commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from torch import Tensor

from distill.cli import main
from distill.config import RunConfig
from distill.pretraining.pipeline import save_pipeline
from distill.recipe import load_config
from distill.training.trainer import Trainer
from teachers.ddpm import build_unet

Interrupter = Callable[[str, int], None]
Load = Callable[..., RunConfig]
Refuse = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads cost more than they bring on tensors this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline of two levels, 8 and 16 channels, with a seeded initialisation."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        unet = build_unet(image_size=32, block_out_channels=[8, 16])
    save_pipeline(unet, DDPMScheduler(), folder)
    return folder


def write_recipe(folder: Path, teacher: Path) -> Path:
    """A run of both arms, a few steps each, on shapes of 32 px."""
    tree = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {
            "labelled": 6,
            "unlabelled": 12,
            "options": {"size": 32, "train": 16, "val": 3, "test": 5},
        },
        "teacher": {"path": str(teacher), "dtype": "float32"},
        "student": {"model": "test_resnet", "kwargs": {"drop_path_rate": 0.2}},
        "pairs": [{"student": "layer3", "teacher": "up_blocks.0"}],
        "policy": {"bins": 4},
        "train": {
            "steps": 5,
            "batch": 4,
            "unlabelled_batch": 4,
            "warmup": 1,
            "ema": 0.5,
            "precision": "no",
            "log_every": 1,
            "checkpoint_every": 2,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Path) -> Path:
    """A recipe whose runs lie in `tmp_path / "runs"`."""
    return write_recipe(tmp_path, teacher_folder)


@pytest.fixture
def load(recipe: Path) -> Load:
    """The config of the tiny recipe with overrides."""
    return lambda *overrides: load_config(RunConfig, recipe, overrides)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The folder of a run that came to its end; for reading only."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(write_recipe(folder, teacher_folder))]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def exported(finished_run: Path) -> Path:
    """Its student, as exported; for reading only."""
    return finished_run / "student"


@pytest.fixture
def images() -> Tensor:
    """(3, 3, 32, 32) in [0, 1]."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupter:
    """Press Ctrl-C (a real SIGINT to this process) once, in a given step of a given arm."""
    train_step = Trainer.train_step

    def at(arm: str, step: int) -> None:
        def stepping(trainer: Trainer, batch: Any) -> Any:
            if (trainer.arm, trainer.step + 1) == (arm, step):
                os.kill(os.getpid(), signal.SIGINT)
            return train_step(trainer, batch)

        monkeypatch.setattr(Trainer, "train_step", stepping)

    return at


@pytest.fixture
def stopped_run(recipe: Path, interrupt: Interrupter, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted in step 3 of its first arm."""
    interrupt("distilled", 3)
    assert main(["train", str(recipe)]) == 130
    monkeypatch.undo()
    return recipe.parent / "runs" / "tiny"


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The command exits with 2 and one line on stderr, which is returned."""

    def check(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        progress = ("distilled 5/5", "scratch 5/5")
        told = [line for line in err.splitlines() if not line.startswith(progress)]
        lines = [line for line in told if ": trying two steps of " not in line]
        assert len(lines) == 1, err
        assert out == ""
        assert lines[0].startswith("distill: error: ")
        return lines[0].removeprefix("distill: error: ")

    return check
