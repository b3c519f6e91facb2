"""What a finished run's policy is asked, it answers as it did in training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.build import build_accelerator, build_training_set
from distill.cli import main
from distill.data import as_float
from distill.errors import UserError
from distill.reporting.choices import Choices, load_state, recall_choices
from distill.reporting.policy import extremes
from distill.studies.comparison import read_run
from distill.training.loop import checkpoint_path, taught_path
from distill.training.trainer import Trainer


def test_choices_are_those_of_the_trainers_student_and_policy(finished_run: Path) -> None:
    run = read_run(finished_run)
    choices = recall_choices(run, "distilled", run.config)
    assert choices.split == "3 validation images"
    assert choices.step == 5

    data = build_training_set(run.config.data)
    trainer = Trainer(run.config, "distilled", data, build_accelerator("cpu"))
    path = checkpoint_path(finished_run, "distilled")
    trainer.load_state(checkpoint.load(path), path)
    examples = data.benchmark.dataset("val")
    images = as_float(torch.stack([examples[index][0] for index in range(3)]))
    with torch.no_grad():
        _, maps = trainer.student.eval()(images)
    contexts = maps[trainer.student.layers[-1]].mean(dim=(2, 3))
    assert trainer.policy is not None
    torch.testing.assert_close(choices.probabilities, trainer.policy.probabilities(contexts))
    assert choices.timesteps.tolist() == trainer.timesteps.tolist()


def test_means_by_class_are_weighted_by_the_images_shares() -> None:
    choices = Choices(
        split="",
        step=0,
        examples=[],  # type: ignore[arg-type]
        shares=torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
        class_names=("a", "b", "c"),
        probabilities=torch.tensor([[1.0, 0.0], [0.4, 0.6]]),
        timesteps=torch.tensor([10, 20]),
    )
    assert choices.expected.tolist() == pytest.approx([10.0, 16.0])
    assert choices.by_class[0].tolist() == pytest.approx([0.8, 0.2])  # (1 + 0.2) / 1.5
    assert choices.by_class[1].tolist() == pytest.approx([0.4, 0.6])
    assert choices.by_class[2].isnan().all()


def test_images_of_the_smallest_and_of_the_largest_timesteps_are_told_apart() -> None:
    images = [torch.full((3, 2, 2), index, dtype=torch.uint8) for index in range(5)]
    towards_20 = torch.tensor([0.5, 0.1, 0.9, 0.0, 0.3])
    choices = Choices(
        split="",
        step=0,
        examples=[(image, 0) for image in images],
        shares=torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]),
        class_names=("a", "b"),
        probabilities=torch.stack([1 - towards_20, towards_20], dim=1),
        timesteps=torch.tensor([10, 20]),
    )
    smallest, largest = extremes(choices)
    assert [(int(image[0, 0, 0]), caption) for image, caption in smallest] == [
        *((3, "t = 10\na"), (1, "t = 11\nb")),
    ]
    assert [(int(image[0, 0, 0]), caption) for image, caption in largest] == [
        *((2, "t = 19"), (0, "t = 15\nb")),
    ]


def test_a_finetuned_runs_policy_is_asked_about_the_student_it_chose_for(recipe: Path) -> None:
    late = ["train.finetune_steps=2", "train.steps=13", "train.arms=[distilled, scratch]"]
    assert main(["train", str(recipe), *late]) == 0
    folder = recipe.parent / "runs" / "tiny"
    run = read_run(folder)
    taught, last = (
        load_state(run, "distilled"),
        checkpoint.load(checkpoint_path(folder, "distilled")),
    )
    assert (taught["step"], last["step"]) == (11, 13)
    name = next(name for name in taught["distiller"] if name.endswith("conv1.weight"))
    assert not torch.equal(taught["distiller"][name], last["distiller"][name])
    assert recall_choices(run, "distilled", run.config).step == 11
    assert not taught_path(folder, "scratch").exists()

    # The 11th step was timed, and what a forward pass costs was counted.
    result = json.loads((folder / "checkpoints" / "distilled" / "result.json").read_text())
    assert sum(result["parts"].values()) == pytest.approx(1.0)
    assert {"data", "student", "teacher", "policy", "backward", "optimizer"} <= set(result["parts"])
    assert "teacher" not in run.results["scratch"]["parts"]
    assert 0 < result["flops"]["teacher"] < result["flops"]["teacher_whole"]
    assert run.results["scratch"]["flops"] == {
        "student": result["flops"]["student"],
        "teacher": None,
        "teacher_whole": None,
    }


def test_a_second_head_of_training_is_no_part_of_the_student_that_is_asked(recipe: Path) -> None:
    second = [
        "train.auxiliary=0.4",
        "train.arms=[distilled]",
        "student.head_layers=[layer3, layer4]",
    ]
    assert main(["train", str(recipe), *second]) == 0
    run = read_run(recipe.parent / "runs" / "tiny")
    assert recall_choices(run, "distilled", run.config).step == run.config.train.steps


def test_other_images_are_refused(finished_run: Path) -> None:
    run = read_run(finished_run)
    data = dataclasses.replace(run.config.data, options={**run.config.data.options, "train": 17})
    with pytest.raises(UserError, match="not the images that the run was trained on"):
        recall_choices(run, "distilled", dataclasses.replace(run.config, data=data))


def test_a_missing_checkpoint_is_one_line(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    checkpoint_path(tmp_path / "run", "distilled").unlink()
    run = read_run(tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint at"):
        recall_choices(run, "distilled", run.config)
