"""`distill teacher train`: a pipeline that diffusers loads, resumable to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor

from distill import checkpoint
from distill.build import build_accelerator
from distill.cli import main
from distill.data import choose_labelled
from distill.pretraining.teach import TeacherTraining
from distill.recipe import build_config, load_config, to_tree
from distill.run_folder import read_metrics
from distill.teacher_config import TeacherTrainConfig, UNetConfig
from teachers.ddpm import build_unet, sample_images
from teachers.diffusers_unet import diffusers_unet
from tests.distill.pretraining.conftest import card_of, interrupt, photos, write_recipe

Refuse = Callable[..., str]


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
    assert [row["loss/denoising"] for row in rows] == pairs  # that of step 3 is in the checkpoint


@pytest.mark.parametrize("timesteps", [50, 250, 1000])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_schedules_of_every_length_end_in_noise(
    recipe: Path, timesteps: int, schedule: str
) -> None:
    changes = [f"diffusion.timesteps={timesteps}", f"diffusion.beta_schedule={schedule}"]
    config = load_config(TeacherTrainConfig, recipe, changes)
    training = TeacherTraining(config, build_accelerator("cpu"))
    kept = training.scheduler.alphas_cumprod
    assert kept[-1] < 1e-4
    if timesteps == 1000:
        assert torch.equal(kept, DDPMScheduler(beta_schedule=schedule).alphas_cumprod)


def test_a_linear_schedule_too_short_to_end_in_noise_is_refused(
    recipe: Path, refuse: Refuse
) -> None:
    line = refuse("teacher", "train", recipe, "diffusion.timesteps=20", "sample_steps=2")
    assert line == "diffusion: timesteps must be at least 21 for the schedule linear, got 20"


def test_a_teacher_may_be_trained_on_some_of_the_images(
    recipe: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["teacher", "train", str(recipe), "--dry-run"]
    assert main([*asked, "data.unlabelled=5"]) == 0
    assert "# 5 images of 32x32 px" in capsys.readouterr().out
    config = load_config(TeacherTrainConfig, recipe, ["data.unlabelled=5"])
    some = TeacherTraining(config, build_accelerator("cpu")).indices
    assert some == choose_labelled(12, 5, 0)
    assert "between 1 and 12 (the training images), got 13" in refuse(*asked, "data.unlabelled=13")
    assert "between 1 and 12 (the training images), got 0" in refuse(*asked, "data.unlabelled=0")
    assert refuse(*asked, "data.labelled=2").startswith(
        "data.labelled: teachers are trained without labels"
    )


def test_sample_grids_on_the_way_change_nothing_but_tensorboard(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe.parent / "runs" / "watched"
    steps = []

    def of_the_average(unet: Any, *arguments: Any, **options: Any) -> Tensor:
        state = checkpoint.load(run / "checkpoints" / "last.pt")
        weights = [weight.detach() for weight in unet.parameters()]
        torch.testing.assert_close(weights, state["average"]["shadow_params"], rtol=0, atol=0)
        steps.append(state["step"])
        return sample_images(unet, *arguments, **options)

    monkeypatch.setattr("distill.pretraining.teach.sample_images", of_the_average)
    assert main(["teacher", "train", str(recipe), "sample_every=2", "name=watched"]) == 0
    assert steps == [2, 4, 5]
    states = [checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (run, finished)]
    for part in ("unet", "average", "optimizer"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    assert (run / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()
    grids = []
    for folder in (run, finished):
        events = EventAccumulator(str(folder / "tensorboard" / "teacher"))
        events.Reload()
        grids.append({event.step: event for event in events.Images("samples")})
    assert list(grids[0]) == [2, 4, 5]
    assert list(grids[1]) == [5]
    assert grids[0][5].encoded_image_string == grids[1][5].encoded_image_string
    assert grids[0][2].encoded_image_string != grids[0][4].encoded_image_string
    assert grids[0][2].width > 64


def test_a_teacher_is_trained_further_where_another_ended(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(finished / "pipeline", folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace('"epsilon"', '"v_prediction"'))
    given = ["unet={}", f"init_from={folder}", "data.options.size=48", "name=further"]
    recipe = write_recipe(tmp_path)
    training = TeacherTraining(
        load_config(TeacherTrainConfig, recipe, given), build_accelerator("cpu")
    )
    began = load_file(finished / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(weight, began[name]) for name, weight in training.unet.named_parameters()
    )
    assert training.scheduler.config["prediction_type"] == "v_prediction"
    assert main(["teacher", "train", str(recipe), *given]) == 0
    further = tmp_path / "runs" / "further"
    assert DDPMPipeline.from_pretrained(further / "pipeline").unet.config["sample_size"] == 48
    card = card_of(further)
    assert "| started from | `pipeline` |" in card
    assert "of the predicted velocity on 6 val images" in card
    assert str(tmp_path) not in card


def test_two_processes_train_one_teacher(recipe: Path) -> None:
    """On the CPU, also where it is not asked for but all there is."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["teacher", "train", str(recipe), "sample_every=2", "device=auto"]
    ended = subprocess.run(
        [*launch, "-m", "distill.cli", *words],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("teacher written to ") == 2
    assert ended.stderr.count("ddpm 5/5") == 1
    run = recipe.parent / "runs" / "ddpm"
    assert ", 2 processes |" in card_of(run)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]


# Resuming


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
    assert last == f"distill: stopped at step {step} of 5; continue with --resume"
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


def test_a_resumed_teacher_draws_the_same_dropout(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "dropped"
    UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
        dropout=0.5,
    ).save_pretrained(source / "unet")
    DDPMScheduler().save_pretrained(source / "scheduler")
    command = ["teacher", "train", str(recipe), "unet={}", f"init_from={source}", "samples=0"]
    assert main([*command, "name=whole"]) == 0
    interrupt(monkeypatch, 3)
    assert main([*command, "name=parts"]) == 130
    monkeypatch.undo()
    assert main([*command, "name=parts", "--resume"]) == 0
    runs = [recipe.parent / "runs" / name for name in ("whole", "parts")]
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in runs]
    torch.testing.assert_close(*(state["unet"] for state in states), rtol=0, atol=0)


def test_a_teacher_that_was_moved_is_resumed(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt(monkeypatch, 2)
    assert main(["teacher", "train", str(recipe)]) == 130
    monkeypatch.undo()
    moved = tmp_path / "elsewhere" / "mine"
    moved.parent.mkdir()
    (recipe.parent / "runs" / "ddpm").rename(moved)
    places = ["name=mine", f"output={moved.parent}"]
    assert main(["teacher", "train", str(moved / "config.yaml"), *places, "--resume"]) == 0
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (moved, finished)]
    torch.testing.assert_close(*(state["unet"] for state in states), rtol=0, atol=0)


def test_a_checkpoint_of_before_a_key_was_there_is_resumed(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 2)
    assert main(["teacher", "train", str(recipe)]) == 130
    monkeypatch.undo()
    last = recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt"
    state = checkpoint.load(last)
    for key in ("sample_every", "probe"):
        del state["config"][key]
    del state["config"]["unet"]["size"]
    checkpoint.save(last, state)
    assert main(["teacher", "train", str(recipe), "--resume"]) == 0
    states = [checkpoint.load(path) for path in (last, finished / "checkpoints" / "last.pt")]
    torch.testing.assert_close(*(state["unet"] for state in states), rtol=0, atol=0)


# Sizes


@pytest.mark.parametrize(("size", "millions"), [("tiny", 4.0), ("small", 14.4), ("base", 35.7)])
def test_a_size_stands_for_an_architecture(size: Any, millions: float) -> None:
    unet = UNetConfig(size=size)
    with torch.device("meta"):
        network = build_unet(
            image_size=64,
            block_out_channels=unet.block_out_channels,
            layers_per_block=unet.layers_per_block,
            attention_levels=unet.attention_levels,
        )
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_explicit_keys_count_more_than_the_size_and_without_one_nothing_changes() -> None:
    tree = {"unet": {"size": "base", "layers_per_block": 1}}
    unet = build_config(TeacherTrainConfig, tree).unet
    assert (unet.block_out_channels, unet.layers_per_block) == ([128, 256, 256, 256], 1)
    assert unet.attention_levels == [1]
    old = build_config(TeacherTrainConfig, {"unet": {"block_out_channels": [8, 16]}})
    assert (old.unet.layers_per_block, old.unet.attention_levels) == (1, [])
    for config in (build_config(TeacherTrainConfig, tree), old):
        assert build_config(TeacherTrainConfig, to_tree(config)) == config


# Folders of images


def test_a_teacher_learns_from_a_folder_of_images(recipe: Path, tmp_path: Path) -> None:
    photos(tmp_path)
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: [32, 48]}}"
    few = ["steps=2", "diffusion.prediction_type=v_prediction", "save_dtype=float16", "samples=0"]
    assert main(["teacher", "train", str(recipe), data, *few]) == 0
    run = recipe.parent / "runs" / "ddpm"
    teacher = diffusers_unet(str(run / "pipeline"), layers=["mid_block"])
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    assert list(teacher.family.configs["unet"]["sample_size"]) == [32, 48]
    assert not (run / "samples.png").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_patches_of_images_of_all_sizes_are_learnt_from(
    recipe: Path, tmp_path: Path, workers: int
) -> None:
    photos(tmp_path, ((90, 40), (20, 10), (33, 65)))
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: 32, augment: patch}}"
    few = ["steps=2", f"data.workers={workers}"]
    assert main(["teacher", "train", str(recipe), data, *few]) == 0
    teacher = diffusers_unet(
        str(recipe.parent / "runs" / "ddpm" / "pipeline"), layers=["mid_block"]
    )
    assert teacher.family.configs["unet"]["sample_size"] == 32
