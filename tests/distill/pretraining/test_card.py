"""The card of a teacher: how its training went, how good it is, and why that is not known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.pretraining.card import means
from distill.pretraining.judge import held_out
from distill.run_folder import read_metrics
from tests.distill.pretraining.conftest import card_of, photos


def test_the_card_tells_how_the_training_went_and_how_good_the_teacher_is(finished: Path) -> None:
    card = card_of(finished)
    losses = [row["loss/denoising"] for row in read_metrics(finished)]
    curve = ", ".join(f"{loss:.3f}" for loss in losses)
    assert f"| loss | {curve} (means over equal parts of the training, first to last) |" in card
    assert re.search(r"\| speed \| \d+\.\d images per second", card)
    assert re.search(r"\| hardware \| \d+ CPU cores \([\w, ]+\), \d+ threads? \|", card)
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


def test_a_run_that_lost_its_log_has_no_card_to_write(
    recipe: Path, refuse: Callable[..., str]
) -> None:
    words = ["teacher", "train", str(recipe), "steps=1", "samples=0"]
    assert main(words) == 0
    log = recipe.parent / "runs" / "ddpm" / "metrics.jsonl"
    log.unlink()
    line = refuse(*words, "--resume")
    assert line.startswith(f"{log} has no rows: the teacher in")


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
    palette = None

    def __init__(self, root):
        pass

    def dataset(self, split):
        levels = [0, 255, 20, 230] * 4
        return [(torch.full((3, 32, 32), x, dtype=torch.uint8), int(x > 99)) for x in levels]
"""


@pytest.mark.parametrize(("task", "said"), [(None, False), ("classification", True)])
def test_a_benchmark_without_val_images_is_judged_on_those_of_train(
    capsys: pytest.CaptureFixture[str], task: str | None, said: bool
) -> None:
    train = [(torch.zeros(3, 8, 8), 0)]

    def missing(split: str) -> Any:
        if split == "val":
            raise FileNotFoundError("no folder val")
        return train

    def empty(split: str) -> Any:
        return train if split == "train" else []

    for dataset in (missing, empty):
        benchmark: Any = SimpleNamespace(dataset=dataset, task=task)
        assert held_out(benchmark) == ("train", train)
    # Labelled images should have a val split, so that it is said why there is none
    assert ("val was not read: no folder val" in capsys.readouterr().err) == said
