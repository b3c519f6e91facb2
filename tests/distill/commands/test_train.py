"""`distill train`, from a recipe to a run folder with everything in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from distill import checkpoint
from distill.cli import main
from distill.reporting.summary import preferred
from distill.run_folder import read_metrics
from distill.training.loop import checkpoint_path


def test_the_run_folder_is_complete(finished_run: Path) -> None:
    files = {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "policy.png",
        "predictions.png",
        "checkpoints",
        "student",
        "tensorboard",
    }
    assert {path.name for path in finished_run.iterdir()} == files
    for name in ("curves", "policy", "predictions"):
        with Image.open(finished_run / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 2  # not blank
    assert not [path for path in finished_run.rglob("*") if path.name.startswith(".")]


def test_the_summary_has_what_the_issue_asks_for(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (summary["task"], summary["benchmark"]) == ("segmentation", "shapes")
    assert (summary["seed"], summary["name"], summary["split"]) == (0, "tiny", "test")
    for arm in ("distilled", "scratch"):
        scores = summary["metrics"][arm]
        assert 0 <= scores["miou"] <= 1
        assert len(scores["iou"]) == 7
    policy = summary["policy"]
    assert (policy["name"], policy["timesteps"]) == ("a2c", [0, 333, 666, 999])
    assert sum(policy["probabilities"]) == pytest.approx(1, abs=1e-5)
    entropy = -sum(p * np.log(p) for p in policy["probabilities"])
    assert policy["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert policy["noise_fraction"] == sorted(policy["noise_fraction"])
    assert summary["images_per_second"] > 0
    assert summary["wall_seconds"] > 0
    assert summary["commit"]
    assert summary["hardware"]


def test_the_log_has_every_step_of_both_arms_once(finished_run: Path) -> None:
    rows = [(row["arm"], row["step"]) for row in read_metrics(finished_run)]
    assert rows == [(arm, step) for arm in ("distilled", "scratch") for step in range(1, 6)]


def test_tensorboard_has_scalars_histograms_and_predictions(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "tensorboard" / "distilled"))
    tags = events.Reload().Tags()
    assert {"loss/task", "loss/feature", "policy/entropy", "policy/reward"} <= set(tags["scalars"])
    assert "policy/learn/value_loss" in tags["scalars"]  # what a2c tells of itself
    assert tags["histograms"] == ["policy/timesteps"]
    assert "predictions/0" in tags["images"]


def test_the_terminal_shows_the_table(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe)]) == 0
    out, err = capsys.readouterr()
    run = recipe.parent / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    scores = summary["metrics"]
    gain = 100 * (scores["distilled"]["miou"] - scores["scratch"]["miou"])
    assert f"mIoU distilled       {100 * scores['distilled']['miou']:.1f}\n" in out
    assert f"mIoU scratch         {100 * scores['scratch']['miou']:.1f}\n" in out
    assert f"{gain:+.1f} points" in out
    arms = summary["policy"]["effective_arms"]
    assert f"preferred timesteps  {preferred(summary['policy'])}; {arms:.1f} effective of" in out
    assert f'timm.create_model("local-dir:{run / "student"}", pretrained=True)' in out
    assert "distilled 5/5: " in err
    assert "images/s" in err


def test_validation_on_the_way_changes_nothing(recipe: Path, finished_run: Path) -> None:
    assert main(["train", str(recipe), "train.evaluate_every=2"]) == 0
    run = recipe.parent / "runs" / "tiny"
    rows = [row for row in read_metrics(run) if "val/miou" in row]
    assert [(row["arm"], row["step"]) for row in rows] == [
        (arm, step) for arm in ("distilled", "scratch") for step in (2, 4)
    ]
    for arm in ("distilled", "scratch"):
        states = [checkpoint.load(checkpoint_path(folder, arm)) for folder in (run, finished_run)]
        torch.testing.assert_close(*(x["distiller"] for x in states), rtol=0, atol=0)


def test_the_random_teacher_is_an_arm_of_its_own(recipe: Path) -> None:
    arms = "train.arms=[random_teacher]"
    assert main(["train", str(recipe), arms, "policy.name=uniform"]) == 0
    run = recipe.parent / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["metrics"]) == ["random_teacher"]
    assert summary["policy"]["probabilities"] == pytest.approx([0.25] * 4)
    assert (run / "student" / "model.safetensors").exists()


def test_policy_and_floor_of_the_summary_are_of_one_arm(recipe: Path) -> None:
    assert main(["train", str(recipe), "train.arms=[scratch, random_teacher]"]) == 0
    folder = recipe.parent / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    results = [
        json.loads((folder / "checkpoints" / arm / "result.json").read_text())
        for arm in ("scratch", "random_teacher")
    ]
    assert summary["policy"]["timesteps"] == results[1]["policy"]["timesteps"]
    assert summary["noise_floor"] == results[1]["noise_floor"]
    assert summary["noise_floor"]["mean"]
    assert summary["images_per_second"] == results[0]["images_per_second"]  # of the student there


def test_scratch_alone_needs_no_teacher(recipe: Path, tmp_path: Path) -> None:
    arms = "train.arms=[scratch]"
    assert main(["train", str(recipe), arms, f"teacher.path={tmp_path / 'none'}"]) == 0
    summary = json.loads((recipe.parent / "runs" / "tiny" / "summary.json").read_text())
    assert summary["policy"] is None


def test_distill_then_finetune_comes_to_its_end(recipe: Path) -> None:
    phases = ["train.schedule=distill_then_finetune", "train.finetune_steps=2"]
    assert main(["train", str(recipe), *phases]) == 0
    rows = read_metrics(recipe.parent / "runs" / "tiny")
    taught = [(row["arm"], row["step"]) for row in rows if "loss/feature" in row]
    assert taught == [("distilled", 1), ("distilled", 2), ("distilled", 3)]


def test_the_policy_is_reported_though_the_last_row_is_of_finetuning(recipe: Path) -> None:
    late = ["train.log_every=5", "train.finetune_steps=1", "train.arms=[distilled]"]
    assert main(["train", str(recipe), *late]) == 0
    summary = json.loads((recipe.parent / "runs" / "tiny" / "summary.json").read_text())
    assert summary["policy"]["name"] == "a2c"


CLASSES = '''
import numpy as np
import torch

class Tints:
    """Images of one colour: is it red, green or blue? Classification."""

    name, task, ignore_index = "tints", "classification", 255
    class_names, num_classes = ("red", "green", "blue"), 3
    palette = np.eye(3, dtype=np.uint8) * 255

    def __init__(self, root, *, size=32):
        self.size = size

    def dataset(self, split):
        return TintedImages(self.size, {"train": 24, "val": 6, "test": 9}[split])

class TintedImages:
    def __init__(self, size, count):
        self.size, self.targets = size, [index % 3 for index in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if not 0 <= index < len(self.targets):
            raise IndexError(index)
        image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        image[self.targets[index]] = 100 + index
        return image, self.targets[index]
'''


def test_classification_with_a_benchmark_of_ones_own(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_tints.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    changes = ["data.benchmark=own_tints:Tints", "data.options={}", "train.steps=12"]
    assert main(["train", str(recipe), *changes, "train.lr=0.01"]) == 0
    run = recipe.parent / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["benchmark"]) == ("classification", "tints")
    for arm in ("distilled", "scratch"):
        assert set(summary["metrics"][arm]["accuracy"]) == {"red", "green", "blue"}
        assert summary["metrics"][arm]["top1"] > 0.4  # chance is a third
    assert "top-1 distilled" in capsys.readouterr().out
    assert not (run / "student" / "head.safetensors").exists()


def test_ones_own_file_beside_the_recipe_is_found(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "own_distance.py").write_text(
        "def squared(student, teacher, *, scale=1.0):\n"
        "    return scale * (student - teacher).square().mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    pair = (
        "{student: layer3, teacher: up_blocks.0, loss: own_distance:squared, options: {scale: 3}}"
    )
    own, mse = ["name=own", f"pairs.0={pair}"], ["name=mse", "pairs.0.weight=3"]
    feature = []
    for changes in (own, mse):
        assert main(["train", str(recipe), *changes, "train.arms=[distilled]"]) == 0
        rows = read_metrics(recipe.parent / "runs" / changes[0].removeprefix("name="))
        feature.append([row["loss/feature"] for row in rows])
    assert feature[0] == pytest.approx(feature[1])
