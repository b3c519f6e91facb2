"""`distill export`: what it compares and refuses, and that a student which fails leaves nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from distill import checkpoint
from distill.benchmarks.shapes import Shapes
from distill.cli import main
from distill.commands import export
from distill.deployment import folder
from distill.deployment.folder import export_student, load_student, read_card
from distill.deployment.formats import SUFFIXES, Deployed, write
from distill.errors import UserError
from distill.evaluation import parity
from distill.training.loop import checkpoint_path
from students.student import Student

Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format torchscript --precision int8", "for int8 use --format onnx"),
        ("--format torchexport --precision int8", "torchexport supports only fp32, fp16; for int8"),
        ("--precision fp16", "timm supports only fp32; for fp16 use --format onnx or torchexport"),
        ("--what backbone", "the timm folder always contains the whole student; leave it out"),
        ("--format onnx --out x.pt2", "onnx files must end in .onnx"),
        ("--format onnx --what classifier", "the student is a segmenter; choose that, or backbone"),
        ("--push me/student", "--push needs --format hub, got timm"),
        ("--format onxx", "invalid choice: 'onxx'"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    exported: Path, refuse: Refuse, words: str, message: str
) -> None:
    assert message in refuse("export", exported, *words.split())


def test_int8_needs_images(exported: Path, refuse: Refuse, tmp_path: Path) -> None:
    words = ["--format", "onnx", "--precision", "int8", "--out", tmp_path / "x.onnx"]
    missing = ["data.benchmark=camvid", "data.options={}"]
    assert "data.root" in refuse("export", exported, *words, *missing)
    assert list(tmp_path.iterdir()) == []


def test_whatever_the_exporter_fails_with_is_its_first_cause_in_one_line(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        try:
            raise AssertionError("only 4D queries\nare supported")
        except AssertionError as error:
            raise LookupError("step 3 of 3") from error

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError) as caught:
        export.export_run(str(exported), format="torchexport", out=str(tmp_path / "a.pt2"))
    assert str(caught.value) == (
        "torch cannot export this student as .pt2: only 4D queries are supported; try another "
        "--format"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", "torchexport", "onnx"])
def test_a_full_disk_is_one_line_that_blames_no_exporter(
    exported: Path, refuse: Refuse, tmp_path: Path, format: str
) -> None:
    """As for a full disk, writing fails where files may not grow."""
    words = ("export", exported, "--format", format, "--out", tmp_path / f"a{SUFFIXES[format]}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        line = refuse(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"cannot write the export to {words[-1]}: ")
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_student_never_appears(
    exported: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: Deployed, path: Path, *rest: Any) -> None:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.head.classifier.bias += 0.01  # type: ignore[union-attr]
        write(model, path, *rest)

    monkeypatch.setattr(export, "write", spoilt)
    (tmp_path / "student.ts").write_text("an older one")
    words = ["--format", "torchscript", "--out", tmp_path / "student.ts"]
    assert (
        "the export failed its comparison with the student: an output is 1.0e-02 off, the limit is "
        "1.0e-04"
    ) in refuse("export", exported, *words)
    words[-1] = tmp_path / "new" / "folder" / "student.ts"
    refuse("export", exported, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["student.ts"]
    assert (tmp_path / "student.ts").read_text() == "an older one"


def test_without_data_a_file_is_compared_on_noise(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Student("test_vit", classes=7, dense=False, image_size=(32, 32)).eval()
    card = dataclasses.replace(
        read_card(exported), model="test_vit", dense=False, kwargs={}, layers=(), head_layers=()
    )
    card.recipe["data"] |= {"benchmark": "camvid", "root": None, "options": {}}
    export_student(student, card, tmp_path / "student")
    printed = export.export_run(str(tmp_path / "student"), format="torchscript")
    assert f"classifier of test_vit in fp32 written to {tmp_path / 'student-classifier.ts'}" in (
        printed
    )
    assert "any B, 32 x 32 px" in printed
    assert "on 16 images of noise, as no held-out ones could be read: camvid" in printed
    assert (tmp_path / "student-classifier.ts").is_file()


# What a comparison lets through


def row(score: float | None = None, equal: float | None = 1.0) -> parity.Row:
    return parity.Row("x", 1.0, score, 0.5, equal)


def test_limits_of_a_comparison() -> None:
    ours = np.array([[30.0, -10.0]], dtype=np.float32)
    pairs = [(ours, ours + 0.5)]
    assert "5.0e-01 off, the limit is 1.0e-04" in str(parity._problem(row(), row(), pairs, "fp32"))
    assert parity._problem(row(), row(), pairs, "fp16") is None  # 2% of 30
    nothing = parity.Row("x", 1.0, None, float("nan"), 1.0)
    assert "not finite" in str(parity._problem(nothing, row(), pairs, "int8"))
    features = row(equal=None)
    assert parity._problem(features, features, pairs, "int8") is None
    assert "100% off" in str(parity._problem(features, features, [(ours, 2 * ours)], "int8"))
    assert parity._problem(row(0.5, 0.1), row(0.505), pairs, "int8") is None
    assert "5.0 points lower" in str(parity._problem(row(0.5), row(0.55), pairs, "int8"))
    assert "90.0% of its predictions" in str(parity._problem(row(equal=0.9), row(), pairs, "int8"))


def test_a_value_that_is_no_number_fails_in_any_batch(
    exported: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = load_student(exported)
    model = Deployed(student, "segmenter")
    sample = parity.Sample([images, images.flip(0)], [], None)
    ours = parity.run_student(student, model, sample)

    def spoilt(file: Path, batches: Any) -> Any:
        outputs = [tuple(array.copy() for array in arrays) for arrays in ours.outputs]
        outputs[1][0][0, 0, 0, 0] = np.nan
        return outputs, {"loaded": [], "rate": 1.0}

    monkeypatch.setattr(parity, "_in_fresh_process", spoilt)
    with pytest.raises(UserError, match="it returns values that are not finite"):
        parity.compare(Path("x.onnx"), "x", model, "fp16", sample, ours)


def test_images_of_void_alone_let_no_other_predictions_through(
    exported: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = load_student(exported)
    model, kind = Deployed(student, "segmenter"), Shapes()
    void = [torch.full((32, 32), 255) for _ in images]
    sample = parity.Sample([images], void, kind)
    ours = parity.run_student(student, model, sample)
    assert ours.row.score is None

    def others(file: Path, batches: Any) -> Any:
        outputs = [tuple(array[:, ::-1].copy() for array in arrays) for arrays in ours.outputs]
        return outputs, {"loaded": [], "rate": 1.0}

    monkeypatch.setattr(parity, "_in_fresh_process", others)
    with pytest.raises(UserError, match="of its predictions are the student's"):
        parity.compare(Path("x.onnx"), "x", model, "int8", sample, ours)


# Folders


def test_a_folder_whose_head_is_another_is_not_written(
    exported: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain timm gives the same features: only the whole student shows it."""

    def zeros(state: dict[str, Tensor], path: Path) -> None:
        save_file({name: torch.zeros_like(value) for name, value in state.items()}, path)

    monkeypatch.setattr(folder, "save_file", zeros)
    line = refuse("export", exported, "--out", tmp_path / "new" / "out")
    assert "failed its comparison with the student: the logits of the folder are" in line
    assert list(tmp_path.iterdir()) == []


def test_exports_of_a_folder_lie_beside_it_under_its_name(
    exported: Path, tmp_path: Path, refuse: Refuse
) -> None:
    """Not as `student`, which may be another one."""
    mine = shutil.copytree(exported, tmp_path / "mine")
    source = export._source(mine, None, ())
    assert source.default("timm", "segmenter", "fp32") == tmp_path / "mine-timm"
    assert source.default("hub", "segmenter", "fp32") == tmp_path / "mine-hub"
    assert source.default("onnx", "backbone", "int8") == tmp_path / "mine-backbone-int8.onnx"
    line = refuse("export", mine, "--arm", "scratch")
    assert "mine is an exported student of distilled; name a run folder" in line


def test_another_student_is_not_replaced(
    finished_run: Path, exported: Path, tmp_path: Path, refuse: Refuse
) -> None:
    before = (exported / "head.safetensors").read_bytes()
    line = refuse("export", finished_run, "--arm", "scratch")
    assert line == f"{exported} contains another student; choose another folder with --out"
    assert (exported / "head.safetensors").read_bytes() == before


def test_a_finished_run_is_exported_without_its_data_and_teacher(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    content = json.loads((run / "student" / "student.json").read_text())
    content["recipe"]["data"] |= {"benchmark": "camvid", "root": "/gone", "options": {}}
    content["recipe"]["teacher"]["path"] = "/gone"
    (run / "student" / "student.json").write_text(json.dumps(content))
    (run / "config.yaml").write_text(yaml.safe_dump(content["recipe"]))
    assert main(["export", str(run), "--arm", "scratch", "--out", str(tmp_path / "out")]) == 0
    assert "images of noise, as no held-out ones could be read" in capsys.readouterr().out
    student, card = load_student(tmp_path / "out")
    assert (card.provenance["arm"], card.provenance["teacher"]) == ("scratch", None)
    average = checkpoint.load(checkpoint_path(finished_run, "scratch"))["average"]
    assert all(torch.equal(value, average[name]) for name, value in student.state_dict().items())


def test_weights_are_on_the_disk_before_they_take_their_place(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = checkpoint.sync

    def watched(path: Path) -> None:
        synced.append(path.name)
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", watched)
    student, card = load_student(exported)
    export_student(student, card, tmp_path / "out")
    assert sorted(synced) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_a_folder_that_does_not_pass_its_check_leaves_the_old_one(
    exported: Path, tmp_path: Path
) -> None:
    def fail(new: Path) -> None:
        assert (new / "model.safetensors").is_file()
        raise UserError("no")

    student, card = load_student(exported)
    with pytest.raises(UserError, match="no"):
        export_student(student, card, tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
