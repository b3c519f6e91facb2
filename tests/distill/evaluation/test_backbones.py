"""Students, timm models and teachers as backbones of one kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from distill.commands.evaluate import evaluate_subject
from distill.deployment.folder import load_student
from distill.errors import UserError
from distill.evaluation.backbones import Backbone, parse_subject
from distill.evaluation.subjects import open_backbone, subject_config

CPU = torch.device("cpu")


def opened(text: str, *overrides: str, size: tuple[int, int] = (32, 32)) -> Backbone:
    subject = parse_subject(text)
    return open_backbone(subject, subject_config(subject, overrides, {}), size, CPU)


@pytest.fixture
def texts(finished_run: Path, teacher_folder: Path) -> list[str]:
    """One subject of each kind."""
    return [
        str(finished_run),
        f"{finished_run}/student,layers=layer2+layer4",
        "timm:test_resnet:scratch",
        f"teacher:{teacher_folder},layers=up_blocks.0+mid_block,timestep=100",
    ]


def test_every_kind_keeps_the_contract(texts: list[str]) -> None:
    images = torch.rand(3, 3, 32, 32)
    for text in texts:
        backbone = opened(text)
        maps = backbone.maps(images)
        assert list(maps) == list(backbone.layers)
        for name, x in maps.items():
            assert x.shape[:2] == (3, backbone.channels[name])
            assert x.dtype == torch.float32
            assert not x.requires_grad
        alone = backbone.maps(images[1:2])  # an image's features do not depend on its batch
        for name, x in maps.items():
            assert torch.allclose(alone[name], x[1:2], atol=1e-5 * float(x.abs().max()) + 1e-6)
        assert backbone.parameters > 0
        assert backbone.flops((32, 32)) > 0


def test_the_last_map_is_the_default(finished_run: Path) -> None:
    assert tuple(opened(str(finished_run)).layers) == ("layer4",)


def test_a_student_brings_its_own_weights(finished_run: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    student = load_student(finished_run)[0]
    with torch.no_grad():
        expected = student.backbone.forward_intermediates(
            (images - student.mean) / student.std, [4], intermediates_only=True
        )[0]
    assert torch.allclose(opened(str(finished_run)).maps(images)["layer4"], expected, atol=1e-5)


def test_weights_of_a_timm_model_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    images = torch.rand(2, 3, 32, 32)
    for name in ("a.safetensors", "a.pth"):
        backbone = opened(f"timm:test_resnet:{tmp_path / name}")
        assert torch.equal(backbone.student.backbone.conv1[0].weight, model.conv1[0].weight)
        scratch = opened("timm:test_resnet:scratch")
        assert not torch.equal(backbone.maps(images)["layer4"], scratch.maps(images)["layer4"])


def test_a_place_may_have_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a,b", "a,lr=1", "c,d.pth"):
        Path(name).mkdir()
    for text, path, weights, layers in (
        ("a,b", "a,b", "", ()),
        ("a,lr=1,layers=x+y", "a,lr=1", "", ("x", "y")),
        ("a,layers=x", "a", "", ("x",)),
        (f"teacher:{tmp_path}/a,b,layers=x", f"{tmp_path}/a,b", "", ("x",)),
        ("timm:resnet18:c,d.pth,layers=x", "resnet18", "c,d.pth", ("x",)),
    ):
        subject = parse_subject(text)
        assert (subject.path, subject.weights, subject.layers) == (path, weights, layers)
    with pytest.raises(UserError, match=r"unknown option 'layer' .*; did you mean 'layers'\?"):
        parse_subject("a,b,layer=x")


def test_scratch_weights_are_a_function_of_the_seed() -> None:
    images = torch.rand(1, 3, 32, 32)
    first, again, other = (
        opened("timm:test_resnet:scratch", f"seed={seed}").maps(images)["layer4"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_convolutional_student_takes_other_sizes(finished_run: Path) -> None:
    backbone = opened(str(finished_run))
    assert backbone.maps(torch.rand(1, 3, 64, 48))["layer4"].shape[-2:] == (2, 2)
    assert backbone.maps(torch.rand(1, 3, 32, 32))["layer4"].shape[-2:] == (1, 1)


def test_a_transformer_says_that_it_takes_one_size() -> None:
    small = "student.kwargs={patch_size: 8, depth: 1}"
    backbone = opened("timm:vit_tiny_patch16_224:scratch", small)
    with pytest.raises(UserError, match=r"only accepts images of 32x32 px; .* evaluate.window"):
        backbone.maps(torch.rand(1, 3, 64, 64))


def test_scales_that_a_network_does_not_take_are_refused_when_it_is_opened(
    finished_run: Path, teacher_folder: Path
) -> None:
    teacher = f"teacher:{teacher_folder},layers=mid_block"
    for text, scale, told in (
        (teacher, 0.9, "at evaluate.scales 0.9: image size 29x29 does not suit this teacher"),
        (
            str(finished_run),
            0.01,
            "images of 1x1 px are too small for this network, whose reduction",
        ),
        ("timm:test_vit:scratch", 1.25, "at evaluate.scales 1.25: "),
    ):
        with pytest.raises(UserError) as caught:
            opened(text, f"evaluate.scales=[1.0, {scale}]")
        assert told in str(caught.value)
        opened(text, f"evaluate.scales=[1.0, {scale}]", "evaluate.window=16")  # windows keep theirs
    with pytest.raises(UserError, match="too small"):
        evaluate_subject(str(finished_run), ["evaluate.scales=[0.01]"], "own")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("timm:", "needs a name"),
        ("timm:resnet18,layer=a", "did you mean 'layers'?"),
        ("exports/a.ts", "a TorchScript file is a program"),
        ("runs/a,timestep=3", "unknown option 'timestep' of a student"),
        ("teacher:runs/t", "name the feature maps"),
        ("teacher:runs/t,layers=a,timestep=-1", "timestep=-1 must be an index"),
        ("timm:resnet18:/none.safetensors", "/none.safetensors"),
        ("timm:resnet17:scratch", "did you mean 'resnet"),
        ("timm:test_resnet:scratch,layers=layer9", "did you mean 'layer"),
        ("teacher:/none,layers=mid_block", "/none"),
    ],
)
def test_mistakes_name_the_subject_and_the_fix(text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(text)
    assert told in str(caught.value)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    (tmp_path / "c.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"b\.safetensors"):
        opened(f"timm:test_resnet:{tmp_path}/b.safetensors")
    with pytest.raises(UserError, match=r"c\.pth"):
        opened(f"timm:test_resnet:{tmp_path}/c.pth")


def test_a_timestep_beyond_the_schedule_is_refused(teacher_folder: Path) -> None:
    with pytest.raises(UserError, match="timestep"):
        opened(f"teacher:{teacher_folder},layers=mid_block,timestep=1000")
