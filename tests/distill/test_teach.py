"""`distill teacher train`: a pipeline that diffusers loads, resumable to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image
from torch import Tensor

from distill import checkpoint
from distill.cli import main
from distill.teach import TeacherTraining
from distill.tracking import read_metrics
from teachers.ddpm import denoising_loss
from teachers.diffusers_unet import diffusers_unet

Refuse = Callable[..., str]


def write_recipe(folder: Path) -> Path:
    tree = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {"options": {"size": 32, "train": 12}, "augment": "flip"},
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
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a teacher that was trained to its end."""
    folder = tmp_path_factory.mktemp("taught")
    assert main(["teacher", "train", str(write_recipe(folder))]) == 0
    return folder / "runs" / "ddpm"


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    train_step = TeacherTraining.train_step

    def stepping(training: TeacherTraining, images: Tensor) -> Tensor:
        if training.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(training, images)

    monkeypatch.setattr(TeacherTraining, "train_step", stepping)


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "pipeline",
        "samples.png",
    }
    with Image.open(finished / "samples.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 64  # two by two of 32 px
        assert np.asarray(picture).std() > 1
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 < row["loss/denoising"] < 3 for row in rows)
    assert rows[0]["lr"] == pytest.approx(4e-4)


def test_diffusers_loads_the_pipeline(finished: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(finished / "pipeline")
    assert pipeline.unet.config["block_out_channels"] == [8, 16]
    assert pipeline.scheduler.config["prediction_type"] == "epsilon"
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_the_average_is_what_becomes_the_teacher(finished: Path) -> None:
    state = checkpoint.load(finished / "checkpoints" / "last.pt")
    weights = list(DDPMPipeline.from_pretrained(finished / "pipeline").unet.parameters())
    torch.testing.assert_close(list(weights), state["average"]["shadow_params"], rtol=0, atol=0)
    assert not torch.equal(weights[0], next(iter(state["unet"].values())))


def test_the_pipeline_is_a_teacher(finished: Path) -> None:
    teacher = diffusers_unet(str(finished / "pipeline"), layers=["mid_block"])
    maps = teacher.features(torch.rand(1, 3, 32, 32), torch.tensor([10]))
    assert maps["mid_block"].shape == (1, 16, 16, 16)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_and_resumed_teacher_equals_an_uninterrupted_one(
    recipe: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    interrupt(monkeypatch, step)
    assert main(["teacher", "train", str(recipe)]) == 130
    monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"distill: stopped at step {step} of 5; go on with --resume"
    run = recipe.parent / "runs" / "ddpm"
    assert not (run / "pipeline").exists()
    assert main(["teacher", "train", str(run / "config.yaml"), "--resume"]) == 0
    states = [checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (run, finished)]
    for part in ("step", "unet", "average", "optimizer"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    losses = [[row["loss/denoising"] for row in read_metrics(folder)] for folder in (run, finished)]
    assert losses[0] == losses[1]
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    assert (run / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


def test_a_teacher_learns_from_a_folder_of_images(recipe: Path, tmp_path: Path) -> None:
    for number in range(3):
        image = np.full((40, 50, 3), 80 * number, dtype=np.uint8)
        (tmp_path / "photos" / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / "deep" / f"{number}.png")
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: [32, 48]}}"
    few = ["steps=2", "diffusion.prediction_type=v_prediction", "save_dtype=float16", "samples=0"]
    assert main(["teacher", "train", str(recipe), data, *few]) == 0
    run = recipe.parent / "runs" / "ddpm"
    teacher = diffusers_unet(str(run / "pipeline"), layers=["mid_block"])
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    assert list(teacher.family.configs["unet"]["sample_size"]) == [32, 48]
    assert not (run / "samples.png").exists()


def test_a_long_enough_training_lowers_the_loss(recipe: Path) -> None:
    changes = ["steps=60", "lr=0.003", "samples=0", "checkpoint_every=60", "log_every=20"]
    assert main(["teacher", "train", str(recipe), *changes]) == 0
    losses = [row["loss/denoising"] for row in read_metrics(recipe.parent / "runs" / "ddpm")]
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_of_a_row_is_the_mean_over_its_own_steps(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = ["name=single", "steps=4", "samples=0"]
    assert main(["teacher", "train", str(recipe), *single]) == 0
    assert main(["teacher", "train", str(recipe), *single, "name=pairs", "log_every=2"]) == 0
    each, pairs = (
        [row["loss/denoising"] for row in read_metrics(recipe.parent / "runs" / name)]
        for name in ("single", "pairs")
    )
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])
    interrupt(monkeypatch, 3)
    stopped = [*single, "name=stopped", "log_every=2"]
    assert main(["teacher", "train", str(recipe), *stopped]) == 130
    monkeypatch.undo()
    assert main(["teacher", "train", str(recipe), *stopped, "--resume"]) == 0
    rows = read_metrics(recipe.parent / "runs" / "stopped")
    # The loss of step 3 went with the interrupted process.
    assert [row["loss/denoising"] for row in rows] == pytest.approx([pairs[0], each[3]])


# Mistakes


def test_mistakes_are_one_line(recipe: Path, refuse: Refuse) -> None:
    for change, words in (
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("unet.layers_per_blok=3", "unknown key 'unet.layers_per_blok'; did you mean 'layers_per"),
        ("diffusion.beta_schedule=cosine", "diffusion.beta_schedule: input should be 'linear'"),
        ("unet.block_out_channels=[8, 9]", "unet: block_out_channels [8, 9] must be multiples"),
        ("unet.attention_levels=[2]", "unet: attention level 2 is outside 0..1"),
        ("data.size=33", "unet: an image of 33x33 does not fit this teacher"),
        ("data.benchmark=shape", "unknown name 'shape'; did you mean 'shapes'?"),
        ("data={benchmark: images}", "images: no folder given; say where with data.root=FOLDER"),
        ("data={benchmark: images, root: /none}", "images: there is no folder /none"),
    ):
        assert words in refuse("teacher", "train", recipe, change)
    assert not (recipe.parent / "runs").exists()


def test_a_broken_image_is_named(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no image")
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}}}"
    assert "b.png: does not decode" in refuse("teacher", "train", recipe, data)


def test_a_run_that_exists_is_left_alone(finished: Path, refuse: Refuse) -> None:
    line = refuse("teacher", "train", finished / "config.yaml")
    assert "exists; go on with --resume, or give another name=" in line


def test_resume_refuses_another_recipe_and_a_broken_checkpoint(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no run" in refuse("teacher", "train", recipe, "--resume")
    interrupt(monkeypatch, 2)
    assert main(["teacher", "train", str(recipe)]) == 130
    monkeypatch.undo()
    for change in ("lr=1", "unet.block_out_channels=[8, 24]"):
        line = refuse("teacher", "train", recipe, change, "--resume")
        assert "is of another recipe; resume with the run's own config.yaml" in line
    last = recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert "last.pt is truncated or not a checkpoint" in refuse(
        "teacher", "train", recipe, "--resume"
    )


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["lr=1e30", "precision=no", "checkpoint_every=1"]
    assert main(["teacher", "train", str(recipe), *wild]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is not finite at step " in line
    assert line.endswith("the last checkpoint is intact; try a smaller lr, or precision=no")
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

    monkeypatch.setattr("distill.teach.denoising_loss", kinked)
    assert main(["teacher", "train", str(recipe), "checkpoint_every=1"]) == 2
    assert "the gradient is not finite at step 2;" in capsys.readouterr().err
    state = checkpoint.load(recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt")
    assert state["step"] == 2
    assert all(bool(x.isfinite().all()) for x in state["unet"].values())
