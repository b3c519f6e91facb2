"""`distill bench`, on a small teacher: what it measures and says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from distill.cli import main
from distill.config import RunConfig
from distill.costs import step
from distill.costs.published import CIFAR10_DDPM
from distill.recipe import load_config
from distill.training.clock import Clock
from teachers.ensemble import Ensemble

PARTS = {"data", "policy", "teacher", "student", "backward", "optimizer"}


@pytest.fixture(scope="module")
def told() -> StringIO:
    """What the run of `figures` printed."""
    return StringIO()


@pytest.fixture(scope="module")
def figures(
    teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory, told: StringIO
) -> dict[str, object]:
    """Of one short run, with a teacher of fewer timesteps than most have; the steps of
    ours, cached and naive take a time that is given, those of the round to warm up another."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    short = shutil.copytree(teacher_folder, out.with_name("short"))
    DDPMScheduler(num_train_timesteps=100).save_pretrained(short / "scheduler")
    words = ["bench", "--teacher", str(short), "--out", str(out)]
    given, measure = [9.0, 9.0, 9.0, 0.5, 0.25, 2.0], step.seconds_of

    def seconds(*step: Any) -> float:
        measured = measure(*step)
        return given.pop(0) if given else measured

    with redirect_stdout(told), pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "seconds_of", seconds)
        assert main([*words, "--batch", "4", "--rounds", "1", "--layer", "down_blocks.1"]) == 0
    with Image.open(out.with_suffix(".png")) as chart:
        assert chart.width > 2 * chart.height > 0
    read: dict[str, object] = json.loads(out.read_text())
    return read


def test_rates_and_ratios_by_hand(figures: dict[str, object]) -> None:
    expected = {
        "images_per_second": 8.0,
        "images_per_second_cached": 16.0,
        "naive_images_per_second": 2.0,
        "ratio": 4.0,
        "ratios": [4.0],
        "ratio_cached": 8.0,
        "ratios_cached": [8.0],
    }
    assert {key: figures[key] for key in expected} == expected


def test_shares_are_shares(figures: dict[str, float]) -> None:
    for part in ("", "_teacher", "_student"):
        assert 0 < figures[f"share_of_peak{part}"] < 1
    assert 0 < figures["policy_share"] < 1
    assert 0 < figures["teacher_gflop"] < figures["naive_teacher_gflop"]


@pytest.mark.parametrize("case", ["", "_cached", "_naive"])
def test_the_parts_of_every_case_are_timed(figures: dict[str, dict[str, float]], case: str) -> None:
    assert set(figures[f"parts{case}"]) == PARTS
    assert all(seconds > 0 for seconds in figures[f"parts{case}"].values())


@pytest.mark.parametrize("case", ["", "_cached", "_naive"])
def test_the_memory_of_the_parts_of_every_case_is_told(
    figures: dict[str, dict[str, float]], case: str
) -> None:
    memory = figures[f"parts_memory_mib{case}"]
    assert set(memory) == PARTS
    # Four images of 32 px in float32; the maps of a resnet18, kept for the gradients.
    assert 4 * 3 * 32 * 32 * 4 / 2**20 <= memory["data"] < memory["student"]
    # Gradients of 11 million weights, where the optimiser finds them.
    weights = 11.2e6 * 4 / 2**20
    assert memory["optimizer"] > weights > memory["data"]


def test_the_table_tells_the_memory_of_every_part(
    figures: dict[str, dict[str, float]], told: StringIO
) -> None:
    (line,) = (line for line in told.getvalue().splitlines() if "MiB" in line)
    for part, held in figures["parts_memory_mib"].items():
        assert f"{part} {held:.3g}" in line


def test_our_features_are_near_those_of_the_naive_way(figures: dict[str, float]) -> None:
    error = figures["feature_error"]
    assert 0 < error < 0.02 if figures["dtype"] == "bfloat16" else error < 1e-4


def test_the_network_is_the_published_one() -> None:
    """35.7 million weights (Ho et al. 2020), one attention head."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        unet = UNet2DModel.from_config(CIFAR10_DDPM)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 35.7
    assert unet.mid_block.attentions[0].heads == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "1"], "bench: needs at least 2 images and 1 round, got 1 and 5"),
        (["--rounds", "0"], "bench: needs at least 2 images and 1 round, got 64 and 0"),
        (["--layer", "mid_blok"], "--layer: no layer 'mid_blok'; did you mean 'mid_block'?"),
        (["--out", "nowhere/at/all.json"], "--out: nowhere/at/all.json must be a .json file in a"),
        (["--out", "."], "--out: . must be a .json file in a folder that exists"),
        (["--teacher", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line(refuse: Callable[..., str], arguments: list[str], told: str) -> None:
    assert told in refuse("bench", *arguments)


def bench_recipe(recipe: Path, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "bench.json"
    assert main(["bench", str(recipe), "--rounds", "1", "--out", str(out), *words]) == 0
    read: dict[str, Any] = json.loads(out.read_text())
    return read


def test_a_recipe_is_timed_as_it_trains(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With unlabelled images, several pairs and augmentation."""
    words = ["train.batch=4", "train.unlabelled_batch=6", "data.augment=crop", "data.size=48"]
    pairs = (
        "pairs=[{student: layer2, teacher: mid_block}, {student: layer3, teacher: down_blocks.0}]"
    )
    figures = bench_recipe(recipe, tmp_path, *words, pairs)
    assert figures["batch"] == 4 + 6
    assert figures["image_size"] == [48, 48]
    assert figures["layers"] == ["mid_block", "down_blocks.0"]
    assert figures["student"] == "test_resnet"
    assert figures["ratios"] == [
        pytest.approx(figures["images_per_second"] / figures["naive_images_per_second"])
    ]
    table = capsys.readouterr().out
    assert "one step: 10 images of 48x48 px, mid_block and down_blocks.0 of " in table
    # The cached images are not augmented
    assert figures["ratio_cached"] > 0
    assert "cached" in table
    assert not (tmp_path / "runs").exists()


def test_the_naive_step_computes_all_members_of_an_ensemble_to_their_end(
    recipe: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = {"name": "diffusers_unet", "path": str(teacher_folder)}
    config = load_config(
        RunConfig,
        recipe,
        [
            "teacher.name=ensemble",
            "teacher.path=''",
            f"teacher.options={{members: {{a: {member}, b: {member}}}}}",
            "pairs=[{student: layer2, teacher: a/mid_block+b/mid_block}]",
        ],
    )
    for whole in (False, True):
        teacher = step.prepare(config, whole).trainer.teacher
        assert isinstance(teacher, Ensemble)
        assert [member.early_exit for member in teacher.members.values()] == [not whole] * 2


def test_a_teacher_without_timesteps_is_timed(recipe: Path, tmp_path: Path) -> None:
    words = ["teacher.name=timm", "teacher.path=test_vit", "teacher.random_weights=0"]
    words += ["pairs=[{student: layer2, teacher: blocks.0}]", "policy.name=fixed"]
    figures = bench_recipe(recipe, tmp_path, *words, "policy.bins=1")
    assert figures["layers"] == ["blocks.0"]
    assert 0 < figures["teacher_gflop"] < figures["naive_teacher_gflop"]


def test_a_mixture_of_timesteps_counts_each_of_them(recipe: Path, tmp_path: Path) -> None:
    one = bench_recipe(recipe, tmp_path, "policy.bins=3")
    mixed = bench_recipe(recipe, tmp_path, "policy.bins=3", "policy.name=soft_mix")
    for key in ("teacher_gflop", "naive_teacher_gflop"):
        assert mixed[key] == pytest.approx(3 * one[key])


def test_features_without_room_leave_no_cached_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = bench_recipe(recipe, tmp_path, "teacher.cache_gb=1.0e-6")
    assert not [key for key in figures if "cached" in key]
    assert "no step with cached features: teacher.cache: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "8"], "--batch: with a recipe, give train.batch=N instead"),
        (["--compile"], "--compile: with a recipe, give teacher.compile=true student.compile=true"),
        (["train.batch=auto"], "train.batch: bench needs a number, not auto"),
        (["train.batch=1"], "train.batch: 1 is too small"),
        (["pairs.0.teacher=mid_blok"], "pairs.0.teacher: no layer 'mid_blok'; did you mean"),
    ],
)
def test_mistakes_with_a_recipe_are_one_line(
    refuse: Callable[..., str], recipe: Path, arguments: list[str], told: str
) -> None:
    assert told in refuse("bench", str(recipe), *arguments)


def test_an_override_needs_a_recipe(refuse: Callable[..., str]) -> None:
    assert "train.batch=8" in refuse("bench", "train.batch=8")


def test_the_time_of_a_part_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock("student"), clock("teacher"):
        pass
    assert clock.seconds == {"student": 1.0 + 4.0, "teacher": 2.0}
