"""An exported student: whole, opened by plain timm, and nothing of its teachers inside."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import checkpoint
from distill.cli import main
from distill.deployment.folder import (
    StudentCard,
    export_student,
    load_backbone,
    load_student,
    read_card,
    usage,
)
from distill.errors import UserError
from distill.training.loop import checkpoint_path
from students.student import Student

Refuse = Callable[..., str]


def plain(folder: Path, **options: object) -> Any:
    """The model that timm alone makes of an export."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    return model.eval()


def normalised(model: nn.Module, images: Tensor) -> Tensor:
    """Images as timm's own config of the model says."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@torch.no_grad()
def test_plain_timm_gives_the_features_of_the_student(exported: Path, images: Tensor) -> None:
    student, card = load_student(exported)
    model = plain(exported)
    expected = student(images)[1]["layer3"]
    inputs = normalised(model, images)
    found = model.forward_intermediates(inputs, indices=[3], intermediates_only=True)[0]
    assert torch.equal(found, expected)
    assert card.model == "test_resnet"
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()


@torch.no_grad()
def test_plain_timm_takes_a_new_head_and_keeps_the_backbone(exported: Path, images: Tensor) -> None:
    model, same = plain(exported, num_classes=7), plain(exported)
    assert model(normalised(model, images)).shape == (3, 7)
    inputs = normalised(model, images)
    assert torch.equal(model.forward_features(inputs), same.forward_features(inputs))


@torch.no_grad()
def test_plain_timm_opens_it_as_features_only(exported: Path, images: Tensor) -> None:
    model = plain(exported, features_only=True)
    student, _ = load_student(exported)
    maps = model(normalised(model, images))
    assert len(maps) == 5
    assert torch.equal(maps[3], student(images)[1]["layer3"])


def test_the_average_of_the_newest_checkpoint_is_what_leaves(
    exported: Path, finished_run: Path
) -> None:
    state = checkpoint.load(checkpoint_path(finished_run, "distilled"))
    leaves = load_file(exported / "model.safetensors")
    leaves = {f"backbone.{name}": x for name, x in leaves.items()}
    leaves |= {f"head.{n}": x for n, x in load_file(exported / "head.safetensors").items()}
    assert leaves.keys() == state["average"].keys()
    assert all(torch.equal(leaves[name], state["average"][name]) for name in leaves)
    raw = state["distiller"]["student.backbone.conv1.0.weight"]
    assert not torch.equal(leaves["backbone.conv1.0.weight"], raw)


def test_nothing_of_teacher_projector_or_policy_is_inside(
    exported: Path, finished_run: Path
) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "model.safetensors",
        "head.safetensors",
        "student.json",
    }
    state = checkpoint.load(checkpoint_path(finished_run, "distilled"))
    distiller = state["distiller"]
    others = [name for name in distiller if not name.startswith("student.")]
    assert any("projector" in name for name in others)
    saved = [x for file in exported.glob("*.safetensors") for x in load_file(file).values()]
    assert len(saved) == len(distiller) - len(others)
    for name in others:
        if distiller[name].numel() > 1:
            assert not any(torch.equal(distiller[name], x) for x in saved), name


def test_the_card_says_where_it_came_from(exported: Path) -> None:
    card = read_card(exported)
    assert (card.classes, card.class_names[0], card.dense) == (7, "background", True)
    assert (len(card.palette), len(card.palette[0]), card.ignore_index) == (7, 3, 255)
    assert card.recipe["train"]["steps"] == 5
    assert card.provenance["arm"] == "distilled"
    assert card.provenance["step"] == 5
    assert len(card.provenance["teacher"]) == 64
    assert card.version


def test_a_checkout_that_was_never_installed_exports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("distill.version", missing)
    shape = ("model", "classes", "dense", "image_size", "layers", "head", "head_layers")
    more = ("input_size", "kwargs", "class_names", "palette", "task")
    fields: dict[str, Any] = dict.fromkeys((*shape, *more))
    assert StudentCard(**fields, recipe={}).version == "unknown"


def test_the_three_lines_that_load_it_work(exported: Path, images: Tensor) -> None:
    lines = usage(exported)
    assert len(lines.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(lines, names)
    picture = Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8))
    assert names["transform"](picture).shape == (3, 32, 32)
    assert isinstance(names["model"], nn.Module)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "layer", "kwargs"),
    [
        ("test_vit", "blocks.3", {}),
        ("test_convnext", "stages.2", {}),
        ("resnet10t", "layer3", {"output_stride": 8}),
        ("test_vit", "blocks.1", {"patch_size": 8}),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_other_students_and_their_arguments_survive(
    exported: Path, tmp_path: Path, images: Tensor, model: str, layer: str, kwargs: dict[str, int],
    dense: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    student = Student(
        model, classes=7, dense=dense, image_size=(32, 32), layers=[layer], kwargs=kwargs,
        input_size=(64, 64),
    ).eval()  # fmt: skip
    card = read_card(exported)
    changes = {"model": model, "kwargs": kwargs, "layers": [layer], "dense": dense}
    changes |= {"input_size": (64, 64), "head_layers": student.head_layers}
    export_student(student, type(card)(**{**vars(card), **changes}), tmp_path / "out")
    again, _ = load_student(tmp_path / "out")
    for one, two in zip(student(images), again(images), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, two)
        else:
            assert torch.equal(one[layer], two[layer])
    opened = plain(tmp_path / "out")
    assert timm.data.resolve_model_data_config(opened)["input_size"] == (3, 64, 64)
    large = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    expected = student.backbone.forward_features(normalised(opened, large))
    assert torch.equal(opened.forward_features(normalised(opened, large)), expected)


# The command


def test_export_writes_the_arm_asked_for_and_prints_how_to_load_it(
    finished_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm in ("distilled", "scratch"):
        arguments = ["export", str(finished_run), "--arm", arm, "--out", str(tmp_path / arm)]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert f"student of {arm} at step 5 written to {tmp_path / arm}" in out
        assert out.rstrip().endswith(usage(tmp_path / arm))
        assert read_card(tmp_path / arm).provenance["arm"] == arm
    for name in ("model.safetensors", "head.safetensors", "config.json"):
        assert (tmp_path / "distilled" / name).read_bytes() == (exported / name).read_bytes()
    mine, theirs = (
        load_file(tmp_path / arm / "model.safetensors") for arm in ("distilled", "scratch")
    )
    assert not torch.equal(mine["conv1.0.weight"], theirs["conv1.0.weight"])


def test_a_run_that_was_stopped_can_be_exported(
    stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(stopped_run)]) == 0
    assert "at step 3 written to" in capsys.readouterr().out
    assert load_student(stopped_run)[1].provenance["step"] == 3


def test_mistakes_of_the_command_are_one_line(
    stopped_run: Path, tmp_path: Path, refuse: Refuse
) -> None:
    line = refuse("export", stopped_run, "--arm", "random_teacher")
    assert line.endswith(f"--arm random_teacher: {stopped_run} has only distilled, scratch")
    line = refuse("export", stopped_run, "--arm", "scratch")
    assert "no checkpoint at" in line
    line = refuse("export", tmp_path / "none")
    assert "none is not a run folder or an exported student" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    line = refuse("export", stopped_run, "--out", tmp_path / "mine")
    assert "mine exists and is not an exported student; choose another folder" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# All or nothing


def test_an_older_export_is_replaced_and_nothing_lies_about(exported: Path, tmp_path: Path) -> None:
    student, card = load_student(exported)
    for _ in range(2):
        export_student(student, card, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_keeps_the_old_export(exported: Path, tmp_path: Path, failing: int) -> None:
    """The limit on a file's size lets none, the first, or the first two of the files through."""
    shutil.copytree(exported, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    student, card = load_student(exported)
    sizes = sorted(len(content) for content in before.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-failing] - 1, hard))
    try:
        with pytest.raises(UserError, match=r"out") as caught:
            export_student(student, card, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_between_the_renames_keeps_an_export(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    student, card = load_student(exported)
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        export_student(student, card, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_others_may_read_an_export_as_far_as_the_umask_lets_them(
    exported: Path, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        export_student(*load_student(exported), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# What does not load


def test_weights_that_may_not_be_read_are_not_called_missing(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"permission denied: .*model\.safetensors \(ask its owner"):
        load_student(exported)


def test_a_damaged_export_names_the_file(exported: Path, tmp_path: Path) -> None:
    for name, pattern in (
        ("model.safetensors", "model.safetensors is missing or broken"),
        ("head.safetensors", "head.safetensors is missing or broken"),
        ("student.json", "student.json is missing or damaged: "),
    ):
        broken = tmp_path / name
        shutil.copytree(exported, broken)
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=pattern):
            load_student(broken)
        if name != "student.json":
            (broken / name).unlink()
            with pytest.raises(UserError, match=pattern):
                load_student(broken)


def test_a_card_of_another_model_names_the_weights(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "other")
    card = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(card | {"head": "linear"}))
    with pytest.raises(
        UserError, match=r"head\.safetensors does not match the student that its card"
    ):
        load_student(folder)


def test_a_card_of_what_is_not_installed_names_the_card(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "other")
    card = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(card | {"model": "test_resnett"}))
    with pytest.raises(UserError, match=r"student\.json: timm has no model 'test_resnett'"):
        load_student(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"class_names": ["a"]}, "class_names must have 7 entries, as classes"),
        ({"palette": [[1, 2]]}, "palette.0: value should have at least 3 items"),
        ({"provenance": [1]}, "provenance: input should be a valid dictionary"),
        ({"image_size": "x"}, "image_size: "),
    ],
)
def test_a_card_that_was_edited_wrongly_is_named(
    exported: Path, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    card = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(card | change))
    with pytest.raises(UserError, match=rf"^{folder}/student\.json is damaged: {line}"):
        load_student(folder)


def test_a_folder_without_a_student_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no exported student; name a finished run folder"):
        load_student(tmp_path)


def test_a_classifier_is_not_taken_over_with_the_backbone(tmp_path: Path, exported: Path) -> None:
    """From a student with 3 classes to one with 5: the backbone comes, the classifier stays."""
    three, five = (
        Student("test_resnet", classes=classes, dense=False, image_size=(32, 32))
        for classes in (3, 5)
    )
    card = read_card(exported)
    changes = {"classes": 3, "dense": False, "layers": [], "kwargs": {}, "head_layers": []}
    export_student(three, type(card)(**{**vars(card), **changes}), tmp_path / "three")
    before = five.backbone.get_classifier().weight.clone()
    load_backbone(five, tmp_path / "three")
    assert torch.equal(five.backbone.get_classifier().weight, before)
    assert torch.equal(five.backbone.conv1[0].weight, three.backbone.conv1[0].weight)
