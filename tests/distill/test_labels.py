"""A teacher may be told the classes of labelled training images, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image

from distill.build import build_accelerator, build_training_set
from distill.cli import main
from distill.commands.train import score
from distill.config import RunConfig
from distill.errors import UserError
from distill.evaluation.scoring import held_out_examples
from distill.teacher import build_teacher
from distill.training.batch import Batch
from distill.training.loop import batches
from distill.training.trainer import Trainer

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]

BENCHMARK = """
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor
from distill.benchmarks import distinct_colours

class Tones:
    name, task, ignore_index = "tones", "classification", 255
    class_names, num_classes, palette = ("dark", "light"), 2, distinct_colours(2)

    def __init__(self, root):
        self.root = root

    def dataset(self, split):
        return ImageFolder(f"{self.root}/{split}", pil_to_tensor)
"""


@pytest.fixture
def tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the tiny recipe one of classification."""
    (tmp_path / "tones.py").write_text(BENCHMARK)
    monkeypatch.syspath_prepend(tmp_path)
    for split in ("train", "test"):
        for name, tone in (("dark", 0.2), ("light", 0.8)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                image = torch.full((3, 32, 32), tone + 0.05 * number)
                save_image(image, tmp_path / split / name / f"{number}.png")
    return [
        "data.benchmark=tones:Tones",
        f"data.root={tmp_path}",
        "data.options={}",
        "data.labelled=4",
        "data.unlabelled=2",
        "train.unlabelled_batch=2",
    ]


def teacher_of(classes: int) -> Callable[..., Any]:
    """A teacher that has conditions, though this network makes nothing of them."""

    def build(*arguments: Any) -> Any:
        teacher: Any = build_teacher(*arguments)
        teacher.family.classes = classes
        return teacher

    return build


def test_labels_are_shown_in_training_and_never_in_evaluation(
    load: Load, tones: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(*tones, "teacher.labels=true")
    data = build_training_set(config.data)
    with pytest.raises(UserError, match=r"teacher\.labels: tiny is not class-conditional"):
        Trainer(config, "distilled", data, build_accelerator("cpu"))
    monkeypatch.setattr("distill.training.trainer.build_teacher", teacher_of(classes=2))
    trainer = Trainer(config, "distilled", data, build_accelerator("cpu"))
    teacher: Any = trainer.teacher
    shown: list[list[int] | None] = []
    features = teacher.features

    def watched(images: Any, timesteps: Any, generator: Any = None, labels: Any = None) -> Any:
        shown.append(None if labels is None else labels.tolist())
        return features(images, timesteps, generator, labels)

    teacher.features = watched
    images, targets, unlabelled, *_ = next(batches(trainer))
    trainer.train_step(Batch(images, targets, unlabelled))
    # two looks, as the first step measures the noise floor: the same labels in both
    assert shown == [[*targets.tolist(), -1, -1]] * 2
    shown.clear()
    held_out = held_out_examples(config, data.benchmark, data.size)
    score(trainer.average.module, held_out, data.benchmark, config, trainer.accelerator)
    assert shown == []


def test_without_being_asked_for_labels_stay_hidden(load: Load, tones: list[str]) -> None:
    config = load(*tones)
    trainer = Trainer(
        config, "distilled", build_training_set(config.data), build_accelerator("cpu")
    )
    teacher: Any = trainer.teacher
    features, seen = teacher.features, []

    def watched(*arguments: Any) -> Any:
        seen.append(len(arguments))
        return features(*arguments)

    teacher.features = watched
    trainer.train_step(next(batches(trainer)))
    assert set(seen) == {3}  # images, timesteps, generator


@pytest.mark.parametrize("classes", [1, 3])
def test_a_teacher_of_other_classes_is_refused(
    load: Load, tones: list[str], monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    config = load(*tones, "teacher.labels=true")
    monkeypatch.setattr("distill.training.trainer.build_teacher", teacher_of(classes=classes))
    words = rf"^teacher\.labels: .* conditioned on {classes} classes, but the data have 2;"
    with pytest.raises(UserError, match=words):
        Trainer(config, "distilled", build_training_set(config.data), build_accelerator("cpu"))


def test_prompts_that_no_label_would_choose_are_refused(
    load: Load, tones: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = build_teacher(load(*tones))
    monkeypatch.setattr("distill.training.trainer.build_teacher", lambda *arguments: teacher)
    for key, value in (("class_prompts", "[red, green, blue]"), ("class_labels", "true")):
        config = load(*tones, f"teacher.options={{{key}: {value}}}")
        with pytest.raises(UserError, match=rf"^teacher\.options\.{key}: .* teacher\.labels=true"):
            Trainer(config, "distilled", build_training_set(config.data), build_accelerator("cpu"))


def ensemble_of(folder: Path, **options: Any) -> str:
    member = {"name": "diffusers_unet", "path": str(folder), "options": options}
    options = {"members": {"a": member}}
    return "teacher=" + json.dumps({"name": "ensemble", "path": "", "options": options})


def test_the_members_of_an_ensemble_are_asked_too(
    load: Load, tones: list[str], teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = ["pairs.0.teacher=a/mid_block", ensemble_of(teacher_folder)]
    config = load(*tones, *pairs)
    data = build_training_set(config.data)
    with pytest.raises(UserError, match=r"teacher\.labels: tiny is not class-conditional"):
        Trainer(
            load(*tones, *pairs, "teacher.labels=true"), "distilled", data, build_accelerator("cpu")
        )
    built = build_teacher(config)
    monkeypatch.setattr("distill.training.trainer.build_teacher", lambda *arguments: built)
    pairs[1] = ensemble_of(teacher_folder, class_prompts=["red", "green", "blue"])
    with pytest.raises(UserError, match=r"^teacher\.options\.members\.a\.options\.class_prompts: "):
        Trainer(load(*tones, *pairs), "distilled", data, build_accelerator("cpu"))


def test_masks_are_no_class_to_tell(recipe: Path, refuse: Refuse) -> None:
    line = refuse("train", recipe, "teacher.labels=true")
    assert line.startswith("teacher.labels: a mask is not a class that a teacher can be given")
    arms = "train.arms=[scratch]"  # where nobody is told anything
    assert main(["train", str(recipe), "teacher.labels=true", arms, "--dry-run"]) == 0
