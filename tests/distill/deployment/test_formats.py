"""Students as ONNX, `torch.export` and TorchScript files: what they hold, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
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
from distill.deployment import export, folder, parity
from distill.deployment.folder import export_student, load_student, read_card
from distill.deployment.formats import Deployed, describe, write
from distill.deployment.runtimes import load
from distill.errors import UserError
from distill.training.loop import checkpoint_path
from students.heads import resize_logits
from students.student import Student

Refuse = Callable[..., str]
FILES = [("torchexport", ".pt2"), ("torchscript", ".ts")]


@pytest.fixture(scope="session")
def exported(finished_run: Path) -> Path:
    return finished_run / "student"


@pytest.fixture
def images() -> Tensor:
    """(3, 3, 32, 32) in [0, 1]."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(("format", "suffix"), FILES)
def test_a_file_gives_the_students_logits_and_says_what_it_is(
    exported: Path, images: Tensor, tmp_path: Path, format: str, suffix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / f"student{suffix}"
    words = ["export", str(exported), "--format", format, "--out", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"segmenter of test_resnet in fp32 written to {file}" in printed
    assert "float32 (B, 3, H, W), any B, 32 x 32 px" in printed
    assert f"{suffix[1:]} fp32" in printed
    assert "5 images of shapes test" in printed
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    student, card = load_student(exported)
    opened = load(file, trust=True)
    (logits,) = opened.run(images.numpy())
    expected = resize_logits(student(images)[0], (32, 32)).numpy()
    assert logits.shape == (3, 7, 32, 32)
    assert np.abs(logits - expected).max() < 1e-4
    said = opened.metadata
    assert said["class_names"] == list(card.class_names)
    assert said["palette"] == [list(colour) for colour in card.palette]
    assert (said["image_size"], said["ignore_index"]) == ([32, 32], 255)
    assert said["normalisation"]["mean"] == [0.5, 0.5, 0.5]
    assert said["provenance"]["teacher"] == card.provenance["teacher"]
    assert (said["provenance"]["run"], said["provenance"]["teacher_name"]) == (
        "tiny",
        "diffusers_unet",
    )
    assert card.recipe["teacher"]["path"].encode() not in file.read_bytes()


RUNTIME_ALONE = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["student.json"])
(logits,) = session.run(None, {"images": np.load(sys.argv[2])})
assert not {"torch", "timm", "distill"} & sys.modules.keys()
np.save(sys.argv[3], logits)
print(about["what"])
"""


def test_an_int8_file_is_small_and_runs_on_onnxruntime_alone(
    exported: Path, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "student.onnx"
    words = ["--format", "onnx", "--precision", "int8", "--out", str(file)]
    assert main(["export", str(exported), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if line.startswith("  onnx")] == [
        "onnx fp32",
        "onnx int8",
    ]
    weights = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert file.stat().st_size < 0.5 * weights
    np.save(tmp_path / "images.npy", images.numpy())
    arrays = (tmp_path / "images.npy", tmp_path / "logits.npy")
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ALONE, file, *arrays],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == "segmenter\n"
    logits = np.load(tmp_path / "logits.npy")
    with torch.no_grad():
        expected = Deployed(load_student(exported)[0], "segmenter")(images).numpy()
    assert logits.shape == expected.shape == (3, 7, 32, 32)
    spread = expected - expected.mean((2, 3), keepdims=True)  # what differs between positions
    assert np.linalg.norm(logits - expected) < 0.2 * np.linalg.norm(spread)
    said = load(file).metadata
    assert (said["precision"], said["image_size"]) == ("int8", [32, 32])
    assert said["class_names"][0] == "background"


@torch.no_grad()
def test_an_fp16_file_takes_and_gives_float32(
    exported: Path, images: Tensor, tmp_path: Path
) -> None:
    student, card = load_student(exported)
    model, file = Deployed(student, "segmenter", half=True), tmp_path / "student.onnx"
    write(model, file, describe(model, card, "fp16"))
    (logits,) = load(file).run(images.numpy())
    expected = Deployed(student, "segmenter")(images).numpy()
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


@torch.no_grad()
def test_a_backbone_gives_its_last_map_and_the_pooled_feature(
    exported: Path, images: Tensor, tmp_path: Path
) -> None:
    student, card = load_student(exported)
    model = Deployed(student, "backbone")
    file = tmp_path / "backbone.ts"
    write(model, file, describe(model, card, "fp32"))
    features, pooled = load(file, trust=True).run(images.numpy())
    expected = student.backbone.forward_features((images - student.mean) / student.std)
    assert np.allclose(features, expected, atol=1e-5)
    assert np.allclose(pooled, expected.mean((2, 3)), atol=1e-5)
    assert load(file, trust=True).metadata["outputs"] == ["features", "pooled"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "dense", "suffix"),
    [("test_vit", True, ".onnx"), ("test_convnext", False, ".ts")],
)
def test_a_student_that_resizes_its_images_leaves_with_one_size(
    exported: Path, images: Tensor, tmp_path: Path, model: str, dense: bool, suffix: str
) -> None:
    torch.manual_seed(0)
    student = Student(model, classes=7, dense=dense, image_size=(32, 32), input_size=(64, 64))
    deployed = Deployed(student.eval(), "segmenter" if dense else "classifier")
    file = tmp_path / f"student{suffix}"
    write(deployed, file, describe(deployed, read_card(exported), "fp32"))
    opened = load(file, trust=True)
    assert opened.metadata["any_size"] is False
    (logits,) = opened.run(images.numpy())
    expected = student(images)[0]
    expected = resize_logits(expected, (32, 32)) if dense else expected
    assert np.abs(logits - expected.numpy()).max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
def test_a_convolutional_student_takes_any_size(
    exported: Path, tmp_path: Path, suffix: str
) -> None:
    torch.manual_seed(0)
    student = Student("test_resnet", classes=7, dense=True, image_size=(64, 64)).eval()
    deployed, file = Deployed(student, "segmenter"), tmp_path / f"student{suffix}"
    write(deployed, file, describe(deployed, read_card(exported), "fp32"))
    opened = load(file, trust=True)
    assert opened.metadata["any_size"] is True
    for size in ((1, 3, 64, 64), (2, 3, 90, 131)):
        images = torch.rand(size)
        (logits,) = opened.run(images.numpy())
        assert np.abs(logits - deployed(images).numpy()).max() < 1e-4


def test_where_the_size_is_free() -> None:
    def free(model: str, side: int) -> bool:
        student = Student(model, classes=7, dense=True, image_size=(side, side))
        return Deployed(student, "segmenter").any_size

    assert free("test_convnext", 64)
    assert not free("test_vit", 64)
    assert not free("test_resnet", 32)  # its last map has one position


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
    assert "on 16 images of noise, as there are no held-out ones: camvid" in printed
    assert (tmp_path / "student-classifier.ts").is_file()


@torch.no_grad()
def test_a_hiera_student_leaves_as_any_other(
    exported: Path, images: Tensor, tmp_path: Path
) -> None:
    """Hiera's maps are not asked for by the second argument, as those of other models are."""
    torch.manual_seed(0)
    kwargs = {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}
    student = Student(
        "hiera_tiny_224", classes=7, dense=True, image_size=(32, 32), kwargs=kwargs
    ).eval()
    card = dataclasses.replace(
        read_card(exported), model="hiera_tiny_224", kwargs=kwargs, layers=(),
        head_layers=student.head_layers,
    )  # fmt: skip
    export_student(student, card, tmp_path / "student")
    export.export_run(str(tmp_path / "student"), format="timm", out=str(tmp_path / "again"))
    assert torch.equal(load_student(tmp_path / "again")[0](images)[0], student(images)[0])
    assert Deployed(student, "segmenter")(images).shape == (3, 7, 32, 32)
    assert Deployed(student, "backbone")(images)[0].shape == (3, 128, 1, 1)


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
        "torch cannot export this student as .pt2: only 4D queries are supported; another "
        "--format may do"
    )
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format torchscript --precision int8", "for int8 take --format onnx"),
        ("--format torchexport --precision int8", "torchexport is written in fp32, fp16; for int8"),
        ("--precision fp16", "timm is written in fp32; for fp16 take --format onnx or torchexport"),
        ("--what backbone", "the timm folder always holds the whole student; leave it out"),
        ("--format onnx --out x.pt2", "onnx files end in .onnx"),
        ("--format onnx --what classifier", "the student is a segmenter; choose that, or backbone"),
        ("--push me/student", "--push goes with --format hub, not timm"),
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
    with pytest.raises(UserError, match="it gives values that are not finite"):
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


def test_the_metadata_has_the_benchmarks_own_void(exported: Path) -> None:
    student, card = load_student(exported)
    card = dataclasses.replace(card, ignore_index=-1)
    assert describe(Deployed(student, "segmenter"), card, "fp32")["ignore_index"] == -1


# Foreign and hostile files


class Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


Edit = Callable[[bytes], bytes]


def changed(file: Path, to: Path, end: str, edit: Edit, more: Mapping[str, str] = {}) -> Path:
    """A copy of an archive with the content of the entries replaced whose names end so."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, edit(content) if name.endswith(end) else content)
        for name, text in more.items():
            new.writestr(f"{file.stem}/{name}", text)
    return to


def imports_by_its_container(content: bytes) -> bytes:
    """The inputs become an enumeration, whose class torch imports from any module."""
    graph = json.loads(content)
    signature = graph["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "this:x", "name": "y"})
    signature["in_spec"] = json.dumps(spec)
    return json.dumps(graph).encode()


def test_a_pt2_file_that_brings_code_is_not_opened(exported: Path, tmp_path: Path) -> None:
    student, card = load_student(exported)
    model = Deployed(student, "segmenter")
    good, canary = tmp_path / "good.pt2", tmp_path / "canary"
    write(model, good, describe(model, card, "fp32"))
    load(changed(good, tmp_path / "same.pt2", "", lambda content: content))
    relu = rb"torch\.ops\.aten\.relu\w*\.default"
    odd = json.dumps({"config": {"x": {"path_name": "custom_obj_0", "use_pickle": False}}}).encode()
    graph = "models/model.json"
    bad: list[tuple[str, Edit]] = [
        ("sample_inputs/model.pt", lambda content: pickle.dumps(Touch(canary))),
        ("weights_config.json", lambda c: c.replace(b'_pickle": false', b'_pickle": true', 1)),
        ("constants_config.json", lambda content: odd),
        (graph, lambda c: re.sub(relu, b"torch.os.system", c)),
        (graph, lambda c: re.sub(relu, b"torch.ops.aten.from_file.default", c)),
        (graph, lambda c: c.replace(b'"expr_str": "', b'"expr_str": "open(', 1)),
        (graph, lambda c: c.replace(b'"images"', b'"images=open(7)"')),  # an argument's name
        (graph, imports_by_its_container),
    ]
    for end, edit in bad:
        file = changed(good, tmp_path / "bad.pt2", end, edit)
        assert file.read_bytes() != good.read_bytes()
        with pytest.raises(UserError, match=r"might run code of its own \(.*\); it is not opened"):
            load(file)
    more = {"models/more_config.json": json.dumps({"config": {}, "target": "torch.os.system"})}
    with pytest.raises(UserError, match="might run code of its own"):
        load(changed(good, tmp_path / "bad.pt2", "", lambda content: content, more))
    assert not canary.exists()


@pytest.mark.parametrize("suffix", [".ts", ".pt"])
def test_torchscript_is_a_program_and_opened_on_trust_alone(
    exported: Path, tmp_path: Path, suffix: str
) -> None:
    student, card = load_student(exported)
    model, file = Deployed(student, "segmenter"), tmp_path / "student.ts"
    write(model, file, describe(model, card, "fp32"))
    file = file.rename(tmp_path / f"student{suffix}")
    with pytest.raises(UserError, match="a program that may do anything to this machine"):
        load(file)
    assert load(file, trust=True).metadata["what"] == "segmenter"


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts", ".pt"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="is damaged or no file of distill export"):
        load(file, trust=True)


def test_a_foreign_file_says_so(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(tmp_path / "foreign.pt"))
    with pytest.raises(UserError, match=r"was not written by distill export"):
        load(tmp_path / "foreign.pt", trust=True)
    with pytest.raises(UserError, match=r"there is no file"):
        load(tmp_path / "missing.onnx")
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=r"is no exported file: .onnx, .pt2, .ts, .pt"):
        load(tmp_path / "x.pth")


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
    assert line == f"{exported} holds another student; name another folder with --out"
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
    assert "images of noise, as there are no held-out ones" in capsys.readouterr().out
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
