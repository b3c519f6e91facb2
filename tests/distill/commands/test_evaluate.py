"""`distill evaluate`: the figures of a run again, another split, its options and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from distill import build, checkpoint
from distill.cli import main
from distill.commands import evaluate as command
from distill.commands.evaluate import evaluate_subject
from distill.evaluation import protocols


def evaluate(student: Path, *changes: str) -> dict[str, Any]:
    return evaluate_subject(str(student), changes, "own")[0]


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
    finished_run: Path, summary: dict[str, Any]
) -> None:
    for student in (finished_run, finished_run / "student"):
        result = evaluate(student)
        assert result["scores"] == summary["metrics"]["distilled"]
        told = result["protocol"], result["benchmark"], result["split"], result["subject"]
        assert told == ("own", "shapes", "test", str(student))
        assert result["figures"] == {"miou": result["scores"]["miou"]}
        seconds = result["scoring_seconds"]
        assert seconds.keys() == {"read", "predict", "score"}
        assert min(seconds.values()) > 0
        assert sum(seconds.values()) < result["seconds"]


def test_the_table_has_every_class(
    finished_run: Path, capsys: pytest.CaptureFixture[str], summary: dict[str, Any]
) -> None:
    assert main(["evaluate", str(finished_run)]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:] if line.strip())
    scores = summary["metrics"]["distilled"]
    assert rows["miou"] == f"{100 * scores['miou']:.1f}"
    means = {"miou", "mean_accuracy", "pixel_accuracy", "frequency_weighted_iou", "boundary_iou"}
    assert rows.keys() == means | scores["iou"].keys()
    shown = {name: "-" if x is None else f"{100 * x:.1f}" for name, x in scores["iou"].items()}
    assert {name: rows[name] for name in shown} == shown


def test_overrides_choose_split_and_number_of_images(
    finished_run: Path, summary: dict[str, Any]
) -> None:
    val = evaluate(finished_run, "evaluate.split=val")
    assert val["split"] == "val"
    one = evaluate(finished_run, "evaluate.images=1")
    test = summary["metrics"]["distilled"]
    assert val["scores"]["pixel_accuracy"] != test["pixel_accuracy"]
    assert one["scores"]["pixel_accuracy"] != test["pixel_accuracy"]


def test_the_batch_of_the_evaluation_changes_no_figure(
    finished_run: Path, summary: dict[str, Any]
) -> None:
    result = evaluate(finished_run, "evaluate.batch=2")
    assert result["scores"]["miou"] == pytest.approx(
        summary["metrics"]["distilled"]["miou"], abs=0.01
    )


def test_flips_scales_and_windows_change_the_look_at_an_image(
    finished_run: Path, summary: dict[str, Any]
) -> None:
    once = summary["metrics"]["distilled"]
    window = evaluate(finished_run, "evaluate.window=[32, 32]")["scores"]
    assert window["pixel_accuracy"] == pytest.approx(once["pixel_accuracy"], abs=1e-6)
    for change in ("evaluate.flip=true", "evaluate.scales=[1.0, 2.0]", "evaluate.window=16"):
        scores = evaluate(finished_run, change)["scores"]
        assert scores != once


def test_pictures_lie_beside_the_scores(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(finished_run), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["scores"] == evaluate(finished_run)["scores"]
    names = {"scores.json", "scores-confusion.png", "scores-overlays.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in sorted(names)[:2]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_a_run_refuses_windows(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "evaluate.window=16"]) == 2
    assert "evaluate.window: training scores whole images" in capsys.readouterr().err


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
    assert (
        "the student predicts 7 classes, but two has 2; fit a new head with --protocol linear"
        in line
    )
    (tmp_path / "own_others.py").write_text(
        "from distill.benchmarks.shapes import Shapes\n"
        "class Others(Shapes):\n"
        "    name, class_names = 'others', ('background', 'cat', *Shapes.class_names[2:])\n"
    )
    line = refused(capsys, finished_run, "data.benchmark=own_others:Others")
    assert "but others has 'cat'; fit a new head with --protocol linear" in line
    changes = ["evaluate.steps=1"]
    result = evaluate_subject(str(finished_run), changes, "linear", "own_two:Two")[0]
    assert set(result["scores"]["iou"]) == {"off", "on"}


@pytest.fixture(scope="module", params=["onnx", "torchexport"])
def exported(
    request: pytest.FixtureRequest, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An exported segmenter."""
    suffix = {"onnx": "onnx", "torchexport": "pt2"}[request.param]
    file = tmp_path_factory.mktemp("exported") / f"shapes.{suffix}"
    words = ["export", str(finished_run), "--format", request.param, "--what", "segmenter"]
    assert main([*words, "--out", str(file)]) == 0
    return file


def test_an_exported_file_scores_as_the_student_that_it_was_made_of(
    finished_run: Path, exported: Path
) -> None:
    result = evaluate(exported, "data.benchmark=shapes", "data.options={size: 32}")
    changes = ["data.options={size: 32}", "data.unlabelled=null", "data.labelled=null"]
    scores = evaluate(finished_run, *changes)["scores"]
    assert result["scores"]["iou"] == pytest.approx(scores["iou"], abs=1e-3)
    assert scores["miou"] > 0


def test_what_an_exported_file_cannot_be_asked_is_one_line(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--protocol", "linear"], ["--protocol", "finetune"]):
        assert "only works with" in refused(capsys, exported, "data.benchmark=shapes", *words)
    assert main(["compare", str(exported), str(exported), "data.benchmark=shapes"]) == 2
    assert "only works with" in capsys.readouterr().err
    line = refused(capsys, exported, "data.benchmark=shapes", "data.size=64")
    assert "the student needs images of 32x32 px" in line
    missing = tmp_path / f"none{exported.suffix}"
    assert f"no file or folder {missing}" in refused(capsys, missing, "data.benchmark=shapes")


def test_several_processes_are_refused(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(build, "build_accelerator", lambda device: two)
    assert "evaluate needs one process, got 2; start it without" in refused(capsys, finished_run)


def test_mistakes_are_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "contains no exported student; name a finished run folder" in refused(capsys, tmp_path)
    assert "did you mean 'evaluate.split'?" in refused(capsys, finished_run, "evaluate.splitt=val")
    assert "invalid choice: 'pca'" in refused(capsys, finished_run, "--protocol", "pca")
    assert "timm:test_resnet:scratch has no head of its own" in refused(
        capsys, "timm:test_resnet:scratch"
    )
    assert "teachers cannot be fine-tuned" in refused(
        capsys, "teacher:teachers/pretrained/shapes,layers=mid_block", "--protocol", "finetune"
    )
    assert "knn votes on whole images" in refused(capsys, finished_run, "--protocol", "knn")
    line = refused(capsys, finished_run, "data.size=64")
    assert "data.size: with its own head the student needs images of 32x32 px" in line
    line = refused(capsys, f"{finished_run},layers=layer3")
    assert "layers=layer3 names maps to read, but --protocol own uses the whole network" in line
    assert "must be a .json file" in refused(capsys, finished_run, "--out", tmp_path / "a.png")
    assert "evaluate.labels: 17 requested, but there are 16" in refused(
        capsys, finished_run, "--protocol", "label_efficient", "evaluate.labels=[17]"
    )
    for wrong in ("half", "5/4", "0"):
        line = refused(capsys, finished_run, f"evaluate.labels=[{wrong}]")
        assert "evaluate.labels.0: must be a number of images, a share such as 1/16" in line
    assert "there is no folder /none" in refused(
        capsys, finished_run, "data={benchmark: folder, root: /none, options: {num_classes: 7}}"
    )
    assert "nowhere" in refused(capsys, finished_run, "--out", tmp_path / "nowhere" / "a.json")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    images = f"data={{benchmark: images, root: {tmp_path}}}"
    assert "data.benchmark: 'images' has no labels" in refused(capsys, finished_run, images)


def test_a_folder_that_takes_no_scores_is_named_before_the_work(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delattr(command, "evaluate_subject")
    (tmp_path / "b.json").mkdir()
    line = refused(capsys, finished_run, "--out", tmp_path / "b.json")
    assert f"--out: {tmp_path / 'b.json'} must be a .json file" in line
    monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: False)
    line = refused(capsys, finished_run, "--out", tmp_path / "a.json")
    assert f"cannot write to {tmp_path}: permission denied" in line


@pytest.mark.parametrize("protocol", ["linear", "label_efficient"])
def test_a_wrong_mask_among_those_to_score_is_named_before_the_work(
    protocol: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "own_torn.py").write_text(
        "from distill.benchmarks.shapes import Shapes\n"
        "from distill.errors import UserError\n"
        "class Items:\n"
        "    def __len__(self): return 9\n"
        "    def __getitem__(self, index): raise UserError(f'{index}.png: mask value 7')\n"
        "class Torn(Shapes):\n"
        "    name = 'torn'\n"
        "    def dataset(self, split):\n"
        "        return Items() if split == 'test' else super().dataset(split)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delattr(protocols, "drawn")  # what a fit begins with
    changes = ("data.benchmark=own_torn:Torn", "evaluate.labels=[4]", "--protocol", protocol)
    assert "0.png: mask value 7" in refused(capsys, finished_run, *changes)


def test_a_head_of_another_task_and_a_split_without_images_are_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "own_odd.py").write_text(
        "from distill.benchmarks.shapes import Shapes\n"
        "class Whole(Shapes):\n"
        "    name, task = 'whole', 'classification'\n"
        "class Empty(Shapes):\n"
        "    name = 'empty'\n"
        "    def dataset(self, split): return [] if split == 'val' else super().dataset(split)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, finished_run, "data.benchmark=own_odd:Whole")
    assert "predicts every position, but whole has classes of whole images; fit a new" in line
    changes = ["data.benchmark=own_odd:Empty", "evaluate.split=val"]
    assert "empty: split val has no images" in refused(capsys, finished_run, *changes)
    line = refused(capsys, finished_run, "--protocol", "linear", changes[0])
    assert "split val has no images to choose the learning rate on" in line
    words = ["export", str(finished_run), "--format", "torchscript", *changes]
    assert main([*words, "--out", str(tmp_path / "a.ts")]) == 0
    assert "images of noise, as no held-out ones could be read: empty" in capsys.readouterr().out


def test_options_of_the_students_own_benchmark_are_not_those_of_another(
    finished_run: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    line = refuse("evaluate", finished_run, "--benchmark", "cifar10", f"data.root={tmp_path}")
    assert "data.options" not in line
    assert str(tmp_path) in line
    line = refuse("evaluate", finished_run, "data=5")
    assert line == "override 'data=5': data: must be a section with keys, got 5"
