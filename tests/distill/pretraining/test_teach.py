"""`distill teacher train`: a pipeline that diffusers loads, resumable to the bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor

from distill import checkpoint
from distill.build import build_accelerator
from distill.cli import main
from distill.errors import UserError
from distill.pretraining.card import means
from distill.pretraining.config import TeacherTrainConfig, UNetConfig
from distill.pretraining.judge import held_out
from distill.pretraining.teach import TeacherTraining
from distill.recipe import build_config, load_config, to_tree
from distill.tracking import read_metrics
from teachers.ddpm import build_unet, denoising_loss, sample_images
from teachers.diffusers_unet import diffusers_unet

Refuse = Callable[..., str]


def write_recipe(folder: Path) -> Path:
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
    photos(tmp_path)
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


# The card


def card_of(run: Path) -> str:
    return (run / "pipeline" / "README.md").read_text()


def test_the_card_tells_how_the_training_went_and_how_good_the_teacher_is(finished: Path) -> None:
    card = card_of(finished)
    losses = [row["loss/denoising"] for row in read_metrics(finished)]
    curve = ", ".join(f"{loss:.3f}" for loss in losses)
    assert f"| loss | {curve} (means over equal parts of the training, first to last) |" in card
    assert re.search(r"\| speed \| \d+\.\d images a second", card)
    assert re.search(r"\| hardware \| \d+ CPU cores \(\w+\), \d+ threads \|", card)
    assert "of the predicted noise on 6 val images" in card
    header, values = re.search(r"(\| timesteps .*)\n.*\n(\| loss \| .*)\n", card).groups()
    assert header.startswith("| timesteps | 0 to 99 | 100 to 199 |")
    assert len([float(value) for value in values.split("|")[2:-1]]) == 10
    scores = re.search(
        r"mIoU on val: \*\*(\d+\.\d)%\*\* for this teacher, (\d+\.\d)% for the same", card
    )
    assert all(0 < float(score) < 100 for score in scores.groups())
    assert scores[1] != scores[2]
    assert (
        "of `up_blocks.0` at timestep\n20, fitted to 12 labelled train images and scored on 6 val"
        in card
    )
    assert "for this probe alone" in card
    assert str(finished.parent) not in card


def test_the_loss_curve_is_one_of_tenmeans() -> None:
    assert means([*range(25)]) == [0.5, 3, 5.5, 8, 10.5, 13, 15.5, 18, 20.5, 23]
    assert means([2.0, 4.0]) == [2, 4]


def test_a_teacher_of_images_without_labels_is_not_probed(recipe: Path, tmp_path: Path) -> None:
    photos(tmp_path)
    data = f"data={{benchmark: images, root: {tmp_path / 'photos'}, size: 32}}"
    assert main(["teacher", "train", str(recipe), data, "steps=1", "samples=0"]) == 0
    card = card_of(recipe.parent / "runs" / "ddpm")
    assert "Not measured: the data have no labels." in card
    assert "on 3 train images" in card
    assert str(tmp_path) not in card


def test_labels_that_cannot_be_read_cost_the_probe_and_not_the_teacher(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / "images" / f"{name}.png")
        Image.new("L", (32, 32), 7 * (name == "c")).save(
            tmp_path / "data" / "masks" / f"{name}.png"
        )
    (tmp_path / "data" / "train.txt").write_text("a\nb\n")
    (tmp_path / "data" / "val.txt").write_text("c\n")
    data = f"data={{benchmark: folder, root: {tmp_path / 'data'}, options: {{classes: [x, y]}}}}"
    assert main(["teacher", "train", str(recipe), data, "steps=1", "samples=0"]) == 0
    why = f"distill: not judged: {tmp_path / 'data' / 'masks' / 'c.png'}: mask value 7 is not"
    assert capsys.readouterr().err.count(why) == 2
    card = card_of(recipe.parent / "runs" / "ddpm")
    assert card.count("Not measured: images or labels could not be read.") == 2


def test_no_probe_is_made_where_none_is_asked_for(recipe: Path) -> None:
    assert main(["teacher", "train", str(recipe), "steps=1", "samples=0", "probe=0"]) == 0
    assert "Not measured: none was asked for." in card_of(recipe.parent / "runs" / "ddpm")


def test_classification_is_probed_too(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.parent / "two.py").write_text(TWO)
    monkeypatch.syspath_prepend(recipe.parent)
    few = ["steps=1", "samples=0", "data={benchmark: 'two:Two', augment: none}"]
    assert main(["teacher", "train", str(recipe), *few]) == 0
    card = card_of(recipe.parent / "runs" / "ddpm")
    # Dark and bright images: any network's features tell them apart.
    assert "top-1 on val: **100.0%** for this teacher, 100.0% for the same" in card


TWO = """
import torch

class Two:
    name, task, num_classes, class_names, ignore_index = "two", "classification", 2, ("a", "b"), 255

    def __init__(self, root):
        pass

    def dataset(self, split):
        levels = [0, 255, 20, 230] * 4
        return [(torch.full((3, 32, 32), x, dtype=torch.uint8), int(x > 99)) for x in levels]
"""


def test_a_benchmark_without_val_images_is_judged_on_those_of_train() -> None:
    train = [(torch.zeros(3, 8, 8), 0)]

    def missing(split: str) -> Any:
        if split == "val":
            raise FileNotFoundError("no folder val")
        return train

    def empty(split: str) -> Any:
        return train if split == "train" else []

    for dataset in (missing, empty):
        benchmark: Any = SimpleNamespace(dataset=dataset)
        assert held_out(benchmark) == ("train", train)


# Samples on the way


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


def photos(
    folder: Path, sizes: tuple[tuple[int, int], ...] = ((50, 40), (50, 40), (50, 40))
) -> None:
    (folder / "photos" / "deep").mkdir(parents=True)
    for number, size in enumerate(sizes):
        image = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "photos" / "deep" / f"{number}.png")


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
    assert line.startswith(f"distill: error: {damaged}: does not decode (")
    assert line.endswith("or raise data.options.skip")
    few.append("data.options.skip=0.4")
    assert main(["teacher", "train", str(recipe), *few, "name=b"]) == 0
    skipped = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"distill: skipped {damaged}: does not decode (")


# Several processes


def test_two_processes_train_one_teacher(recipe: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launch, "-m", "distill.cli", "teacher", "train", str(recipe), "sample_every=2"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("teacher written to ") == 2
    assert ended.stderr.count("ddpm 5/5") == 1
    run = recipe.parent / "runs" / "ddpm"
    assert ", 2 processes |" in card_of(run)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_a_batch_that_does_not_divide_over_the_processes_is_refused() -> None:
    accelerator: Any = SimpleNamespace(num_processes=3)
    with pytest.raises(UserError, match="batch: 64 does not divide over 3 processes"):
        TeacherTraining(TeacherTrainConfig(), accelerator)


# Checkpoints


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


# Mistakes


def test_mistakes_are_one_line(recipe: Path, refuse: Refuse) -> None:
    for change, words in (
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("unet.layers_per_blok=3", "'unet.layers_per_blok'; did you mean 'unet.layers_per_block'?"),
        ("diffusion.beta_schedule=cosine", "diffusion.beta_schedule: input should be 'linear'"),
        ("unet.block_out_channels=[8, 9]", "unet: block_out_channels [8, 9] must be multiples"),
        ("unet.attention_levels=[2]", "unet: attention level 2 is outside 0..1"),
        ("sample_steps=1001", "sample_steps: 1001 of 1000 timesteps"),
        (
            "init_from=teachers/pretrained/shapes",
            "unet: init_from brings its own; leave the section",
        ),
        ("data.size=33", "unet: an image of 33x33 does not fit this teacher"),
        ("data.benchmark=shape", "unknown name 'shape'; did you mean 'shapes'?"),
        ("data={benchmark: images}", "images: no folder given; say where with data.root=FOLDER"),
        ("data={benchmark: images, root: /none}", "images: there is no folder /none"),
    ):
        assert words in refuse("teacher", "train", recipe, change)
    for changes, words in (
        (["init_from=nowhere"], "init_from: 'nowhere' is not a folder"),
        (["init_from=teachers/pretrained/shapes", "data.options.size=36"], "36x36 does not fit"),
    ):
        assert words in refuse("teacher", "train", recipe, "unet={}", *changes)
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
    for change in ("lr=1.0", "unet.block_out_channels=[8, 24]"):
        line = refuse("teacher", "train", recipe, change, "--resume")
        assert line.startswith(f"resume: {change.split('=')[0]}")
        assert "now; go on with the run's own config.yaml" in line
    with monkeypatch.context() as patch:  # as of a folder that has other images by now
        patch.setattr("distill.pretraining.teach.fingerprint", lambda examples: "other")
        line = refuse("teacher", "train", recipe, "--resume")
    assert line.endswith("last.pt: the training images are not those this run began with")
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

    monkeypatch.setattr("distill.pretraining.teach.denoising_loss", kinked)
    assert main(["teacher", "train", str(recipe), "checkpoint_every=1"]) == 2
    assert "the gradient is not finite at step 2;" in capsys.readouterr().err
    state = checkpoint.load(recipe.parent / "runs" / "ddpm" / "checkpoints" / "last.pt")
    assert state["step"] == 2
    assert all(bool(x.isfinite().all()) for x in state["unet"].values())
