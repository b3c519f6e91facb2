"""Students as ONNX, `torch.export` and TorchScript files: what they hold and give."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cli import main
from distill.commands import export
from distill.deployment.folder import export_student, load_student, read_card
from distill.deployment.formats import Deployed, describe, write
from distill.deployment.runtimes import load
from students.heads import resize_logits
from students.student import Student

FILES = [("torchexport", ".pt2"), ("torchscript", ".ts")]


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
    assert np.linalg.norm(logits - expected) < 0.15 * np.linalg.norm(spread)
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


def test_the_metadata_has_the_benchmarks_own_void(exported: Path) -> None:
    student, card = load_student(exported)
    card = dataclasses.replace(card, ignore_index=-1)
    assert describe(Deployed(student, "segmenter"), card, "fp32")["ignore_index"] == -1
