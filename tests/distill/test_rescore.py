"""`distill evaluate`: the figures of a run again, another split, another head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli import main
from distill.export import load_student
from distill.train import train_arm
from distill.trainer import Trainer


def evaluate(out: Path, *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def summary(finished_run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((finished_run / "summary.json").read_text())
    return loaded


def test_the_own_head_gives_the_figures_of_the_summary(
    finished_run: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    for student in (finished_run, finished_run / "student"):
        result = evaluate(tmp_path / "scores.json", student)
        assert result["scores"] == summary["metrics"]["distilled"]
        assert (result["head"], result["benchmark"], result["split"]) == ("own", "shapes", "test")
        assert result["student"] == str(finished_run / "student")


def test_the_table_has_every_class(
    finished_run: Path, capsys: pytest.CaptureFixture[str], summary: dict[str, Any]
) -> None:
    assert main(["evaluate", str(finished_run)]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:] if line.strip())
    scores = summary["metrics"]["distilled"]
    assert rows["miou"] == f"{100 * scores['miou']:.1f}"
    assert rows.keys() == {"miou", "mean_accuracy", "pixel_accuracy", *scores["iou"]}
    shown = {name: "-" if x is None else f"{100 * x:.1f}" for name, x in scores["iou"].items()}
    assert {name: rows[name] for name in shown} == shown


def test_overrides_choose_split_and_number_of_images(
    finished_run: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    val = evaluate(tmp_path / "val.json", finished_run, "evaluate.split=val")
    assert val["split"] == "val"
    one = evaluate(tmp_path / "one.json", finished_run, "evaluate.images=1")
    test = summary["metrics"]["distilled"]
    assert val["scores"]["pixel_accuracy"] != test["pixel_accuracy"]
    assert one["scores"]["pixel_accuracy"] != test["pixel_accuracy"]


def test_the_batch_of_the_evaluation_changes_no_figure(
    finished_run: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    result = evaluate(tmp_path / "scores.json", finished_run, "evaluate.batch=2")
    assert result["scores"]["miou"] == pytest.approx(
        summary["metrics"]["distilled"]["miou"], abs=0.01
    )


def test_a_linear_head_changes_no_weight_of_the_backbone(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Trainer] = []

    def keep(trainer: Trainer, *rest: Any) -> None:
        train_arm(trainer, *rest)
        kept.append(trainer)

    monkeypatch.setattr("distill.rescore.train_arm", keep)
    result = evaluate(tmp_path / "linear.json", finished_run, "--head", "linear", "train.steps=20")
    assert result["head"] == "linear"
    assert 0 <= result["scores"]["miou"] <= 1
    exported = load_student(finished_run)[0].backbone.state_dict()
    for student in (kept[0].student, kept[0].average.module):
        probed: dict[str, Tensor] = student.backbone.state_dict()
        assert all(torch.equal(probed[name], exported[name]) for name in exported)
        assert type(student.head).__name__ == "LinearHead"
    assert kept[0].step == 20
    assert {path.name for path in tmp_path.iterdir()} == {"linear.json"}


def test_a_linear_head_learns(finished_run: Path, tmp_path: Path) -> None:
    """On its own training images, with time, it beats the untrained head by far."""
    train = ["evaluate.split=train", "evaluate.images=16", "data.augment=none", "data.labelled=16"]
    long = ["train.steps=80", "train.lr=0.03", "train.ema=0", "train.batch=16"]
    short = evaluate(tmp_path / "a.json", finished_run, "--head", "linear", *train, "train.steps=1")
    after = evaluate(tmp_path / "b.json", finished_run, "--head", "linear", *train, *long)
    assert after["scores"]["pixel_accuracy"] > short["scores"]["pixel_accuracy"] + 0.1


def test_another_number_of_classes_asks_for_a_new_head(
    finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "own_two.py").write_text(
        "from distill.benchmarks.shapes import Shapes\n"
        "class Two(Shapes):\n"
        "    name, num_classes, class_names = 'two', 2, ('off', 'on')\n"
        "    def dataset(self, split):\n"
        "        scenes = super().dataset(split)\n"
        "        return [(scenes[i][0], (scenes[i][1] > 0).byte()) for i in range(len(scenes))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, finished_run, "data.benchmark=own_two:Two")
    assert "the student predicts 7 classes, two has 2; fit a new head with --head linear" in line
    arguments = [str(finished_run), "data.benchmark=own_two:Two", "--head", "linear"]
    assert set(evaluate(tmp_path / "two.json", *arguments)["scores"]["iou"]) == {"off", "on"}


def test_mistakes_are_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no exported student: name a run folder" in refused(capsys, tmp_path)
    assert "did you mean 'split'?" in refused(capsys, finished_run, "evaluate.splitt=val")
    assert "invalid choice: 'pca'" in refused(capsys, finished_run, "--head", "pca")
    assert "there is no folder /none" in refused(
        capsys, finished_run, "data={benchmark: folder, root: /none, options: {num_classes: 7}}"
    )
    assert "nowhere" in refused(capsys, finished_run, "--out", tmp_path / "nowhere" / "a.json")
