"""Mistakes in a teacher's recipe, damaged images and losses that are not finite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from distill import checkpoint
from distill.cli import main
from distill.errors import UserError
from distill.pretraining.teach import TeacherTraining
from distill.teacher_config import TeacherTrainConfig
from teachers.ddpm import denoising_loss
from tests.distill.pretraining.conftest import interrupt, photos

Refuse = Callable[..., str]


def test_mistakes_are_one_line(recipe: Path, refuse: Refuse) -> None:
    for change, words in (
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("unet.layers_per_blok=3", "'unet.layers_per_blok'; did you mean 'unet.layers_per_block'?"),
        ("diffusion.beta_schedule=cosine", "diffusion.beta_schedule: input should be 'linear'"),
        (
            "unet.block_out_channels=[8, 9]",
            "unet: block_out_channels must be one or more multiples of 8, got [8, 9]",
        ),
        ("unet.attention_levels=[2]", "unet: attention level 2 is outside 0..1"),
        ("sample_steps=1001", "sample_steps: must be at most 1000 (the timesteps), got 1001"),
        (
            "init_from=teachers/pretrained/shapes",
            "unet: init_from already sets it; leave the section",
        ),
        ("data.size=33", "unet: image size 33x33 does not suit this teacher"),
        ("data.benchmark=shape", "unknown name 'shape'; did you mean 'shapes'?"),
        ("data={benchmark: images}", "images: no folder given; set data.root=FOLDER"),
        ("data={benchmark: images, root: /none}", "images: there is no folder /none"),
    ):
        assert words in refuse("teacher", "train", recipe, change)
    for changes, words in (
        (["init_from=nowhere"], "init_from: 'nowhere' is not a folder"),
        (["init_from=teachers/pretrained/shapes", "data.options.size=36"], "36x36 does not suit"),
    ):
        assert words in refuse("teacher", "train", recipe, "unet={}", *changes)
    assert not (recipe.parent / "runs").exists()


def test_a_batch_that_does_not_divide_over_the_processes_is_refused() -> None:
    accelerator: Any = SimpleNamespace(num_processes=3)
    with pytest.raises(UserError, match="batch: 64 is not divisible by 3 processes"):
        TeacherTraining(TeacherTrainConfig(), accelerator)


def test_a_run_that_exists_is_left_alone(finished: Path, refuse: Refuse) -> None:
    line = refuse("teacher", "train", finished / "config.yaml")
    assert "exists; continue with --resume, or choose another name=" in line


def test_resume_refuses_another_recipe_and_a_broken_checkpoint(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no run" in refuse("teacher", "train", recipe, "--resume")
    interrupt(monkeypatch, 2)
    assert main(["teacher", "train", str(recipe)]) == 130
    monkeypatch.undo()
    for change in ("lr=1.0", "unet.block_out_channels=[8, 24]"):
        line = refuse("teacher", "train", recipe, change, "--resume")
        assert line.startswith(f"resume: {change.split('=')[0]}")
        assert "now; use the run's own recipe, or start a new run (init_from reuses " in line
    with monkeypatch.context() as patch:  # as of a folder that has other images by now
        patch.setattr("distill.pretraining.teach.fingerprint", lambda examples: "other")
        line = refuse("teacher", "train", recipe, "--resume")
    assert line.endswith("last.pt: the training images are not those that this run started with")
    last = recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert "last.pt is damaged or not a checkpoint" in refuse(
        "teacher", "train", recipe, "--resume"
    )


# Damaged images


def test_pipes_and_devices_are_no_images(recipe: Path, tmp_path: Path) -> None:
    photos(tmp_path)
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: 32}}"
    assert main(["teacher", "train", str(recipe), "steps=1", "samples=0", data]) == 0


def test_a_broken_image_is_named(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no image")
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}}}"
    assert "b.png: cannot be decoded" in refuse("teacher", "train", recipe, data)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_skipped_up_to_a_limit(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    photos(tmp_path)
    damaged = tmp_path / "photos" / "deep" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:1500])
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: 32, workers: {workers}}}"
    few = ["steps=2", "samples=0", data]
    assert main(["teacher", "train", str(recipe), *few, "name=a"]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith(f"distill: error: {damaged}: cannot be decoded (")
    assert line.endswith("or raise data.options.skip")
    few.append("data.options.skip=0.4")
    assert main(["teacher", "train", str(recipe), *few, "name=b"]) == 0
    skipped = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"distill: skipped {damaged}: cannot be decoded (")
    card = (tmp_path / "runs" / "b" / "pipeline" / "README.md").read_text()
    count = len([*(tmp_path / "photos").rglob("*.png")])
    assert f", train split, {count - 1} images" in card


def test_a_teacher_stopped_by_damaged_images_goes_on_with_a_higher_limit(
    recipe: Path, tmp_path: Path, refuse: Refuse
) -> None:
    photos(tmp_path)
    damaged = tmp_path / "photos" / "deep" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:1500])
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: 32}}"
    command = ["teacher", "train", recipe, "steps=2", "samples=0", data]
    assert "raise data.options.skip" in refuse(*command)
    assert main([*map(str, command), "data.options.skip=0.4"]) == 0


# Values that are not finite


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher", "train", str(recipe), "lr=1e30", "log_every=9"]) == 2
    assert not (recipe.parent / "runs" / "ddpm").exists()  # its name is free again
    wild = ["lr=1e30", "precision=no", "checkpoint_every=1"]
    assert main(["teacher", "train", str(recipe), *wild]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is not finite at step " in line
    assert line.endswith("start a new run (name=...) with a smaller lr")
    state = checkpoint.load(recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt")
    assert f"at step {state['step']};" in line


def test_a_gradient_that_is_not_finite_never_reaches_the_checkpoint(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter(range(5))

    def kinked(*arguments: Any) -> Tensor:
        loss = denoising_loss(*arguments)
        if next(losses) == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
        return loss

    monkeypatch.setattr("distill.pretraining.teach.denoising_loss", kinked)
    assert main(["teacher", "train", str(recipe), "checkpoint_every=1"]) == 2
    assert "the gradient is not finite at step 2;" in capsys.readouterr().err
    state = checkpoint.load(recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt")
    assert state["step"] == 2
    assert all(bool(x.isfinite().all()) for x in state["unet"].values())
