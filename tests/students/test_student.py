"""Students: maps, logits, sizes, errors, and what plain timm makes of an export."""

from __future__ import annotations

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from students.student import Student

HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
# Model, image size, further arguments, a layer with its channels, its map's size.
CASES = [
    ("resnet18", (64, 96), {}, "layer3", 256, (4, 6)),
    ("resnet50", (64, 64), {}, "layer4", 2048, (2, 2)),
    ("resnet18", (32, 32), {"output_stride": 8}, "layer4", 512, (4, 4)),
    ("vit_tiny_patch16_224", (96, 128), {}, "blocks.11", 192, (6, 8)),
    ("vit_small_patch16_224", (32, 32), {"patch_size": 4}, "blocks.5", 384, (8, 8)),
    ("hiera_tiny_224", (64, 96), HIERA, "blocks.2", 64, (4, 6)),
    ("convnext_atto", (64, 96), {}, "stages.2", 160, (4, 6)),
    ("convnext_atto", (32, 32), {"output_stride": 8}, "stages.3", 320, (4, 4)),
]
EXPORTS = [case for case in CASES if case[0] not in ("resnet50", "vit_small_patch16_224")]


def build(model: str, size: tuple[int, int], *, dense: bool = False, **settings: object) -> Student:
    torch.manual_seed(0)
    return Student(model, classes=5, dense=dense, image_size=size, **settings)


def images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("model", "size", "kwargs", "layer", "channels", "grid"), CASES)
@pytest.mark.parametrize("dense", [False, True])
def test_maps_have_the_promised_shape_under_bfloat16_and_channels_last(
    model, size, kwargs, layer, channels, grid, dense
):
    student = build(model, size, dense=dense, layers=[layer], kwargs=kwargs)
    student = student.to(memory_format=torch.channels_last)
    x = images(size).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, maps = student(x)
    assert {name: tuple(x.shape) for name, x in maps.items()} == {layer: (2, channels, *grid)}
    assert student.channels == {layer: channels}
    assert logits.dtype == torch.float32
    assert logits.shape[:2] == (2, 5)
    assert logits.ndim == (4 if dense else 2)
    logits.sum().backward()


@pytest.mark.parametrize(("model", "size", "kwargs"), [case[:3] for case in EXPORTS])
def test_classification_is_timms_own_on_normalised_images(model, size, kwargs):
    student = build(model, size, kwargs=kwargs).eval()
    cfg = student.backbone.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = images(size)
    with torch.no_grad():
        logits, maps = student(x)
        expected = student.backbone((x - mean) / std)
    torch.testing.assert_close(logits, expected)
    assert maps == {}


def test_maps_are_those_of_the_modules_they_are_named_after():
    student = build("resnet18", (64, 64), layers=["layer2", "act1"]).eval()
    seen = {}
    for name in ("act1", "layer2"):
        module = student.backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    _, maps = student(images((64, 64)))
    assert list(maps) == ["act1", "layer2"]
    for name, x in maps.items():
        assert torch.equal(x, seen[name])


@pytest.mark.parametrize(
    ("model", "head", "expected"),
    [
        ("resnet18", "fpn", ("layer1", "layer2", "layer3", "layer4")),
        ("convnext_atto", "linear", ("stages.0", "stages.1", "stages.2", "stages.3")),
        ("vit_tiny_patch16_224", "fpn", ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
    ],
)
def test_dense_head_reads_all_stages_or_spread_blocks(model, head, expected):
    student = build(model, (64, 64), dense=True, head=head)
    assert student.head_layers == expected
    grid = (4, 4) if "vit" in model else (16, 16)
    assert student(images((64, 64)))[0].shape == (2, 5, *grid)


def test_dense_student_stops_after_the_deepest_layer_it_needs():
    student = build("resnet18", (64, 64), dense=True, head_layers=["layer1", "layer2"])
    called = []
    student.backbone.layer3.register_forward_hook(lambda *_: called.append("layer3"))
    student(images((64, 64)))
    assert called == []


@pytest.mark.parametrize("dense", [False, True])
def test_only_labelled_images_are_predicted_and_all_give_maps(dense):
    student = build("resnet18", (64, 64), dense=dense, layers=["layer2"]).eval()
    everything, _ = student(images((64, 64), batch=3))
    logits, maps = student(images((64, 64), batch=3), labelled=2)
    torch.testing.assert_close(logits, everything[:2])
    assert len(maps["layer2"]) == 3


def test_the_maps_of_a_dense_head_are_there_for_the_asking():
    student = build("resnet18", (64, 64), dense=True, layers=["layer1"], head_layers=["layer3"])
    assert list(student(images((64, 64)))[1]) == ["layer1"]
    assert list(student(images((64, 64)), head_maps=True)[1]) == ["layer1", "layer3"]
    assert list(student(images((64, 64)), labelled=0, head_maps=True)[1]) == ["layer1"]


@pytest.mark.parametrize("dense", [False, True])
def test_without_labelled_images_the_backbone_stops_after_the_maps(dense):
    student = build("resnet18", (64, 64), dense=dense, layers=["layer2"])
    called = []
    student.backbone.layer3.register_forward_hook(lambda *_: called.append("layer3"))
    logits, maps = student(images((64, 64)), labelled=0)
    assert called == []
    assert logits.shape == (0,)
    assert len(maps["layer2"]) == 2


def test_small_images_are_resized_to_what_the_backbone_sees():
    student = build("resnet18", (32, 32), input_size=(64, 64), layers=["layer4"])
    _, maps = student(images((32, 32)))
    assert maps["layer4"].shape == (2, 512, 2, 2)


def test_same_seed_gives_the_same_weights():
    first, second = (build("convnext_atto", (32, 32), dense=True).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet19"}, "timm has no model 'resnet19'; did you mean 'resnet1"),
        (
            {"layers": ["layr4"]},
            "no layer 'layr4'; did you mean 'layer4'?",
        ),
        (
            {"dense": True, "head_layers": ["mid_block"]},
            "choose from act1, layer1, layer2, layer3, layer4",
        ),
        ({"dense": True, "head": "fnp"}, "unknown head 'fnp'; did you mean 'fpn'?"),
        ({"head_layers": ["layer4"]}, "head_layers is for dense heads"),
        ({"kwargs": {"patch_size": 4}}, "'resnet18' does not accept {'patch_size': 4}"),
        (
            {"kwargs": {"output_stride": 3}},
            "'resnet18' does not accept {'output_stride': 3}: timm rejects it",
        ),
        (
            {"model": "test_vit", "kwargs": {"patch_size": 0}},
            "'test_vit' does not accept {'patch_size': 0}: integer division",
        ),
        (
            {"model": "vit_tiny_patch16_224", "image_size": (100, 64)},
            "does not accept images of 100x64 px: each side must be a multiple of 16; try 96x64",
        ),
        (
            {"model": "convnext_atto", "image_size": (16, 48)},
            "does not accept images of 16x48 px: each side must be at least 32; try 32x48",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    complete = {"model": "resnet18", "classes": 2, "dense": False, "image_size": (64, 64)}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Student(**(complete | settings))
    assert "\n" not in str(error.value)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(OSError, match="Config file not found"):
        build(f"local-dir:{tmp_path}", (64, 64), pretrained=True)


def test_a_folder_whose_config_names_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"cannot read the model or weights of .*: no 'architecture'"):
        build(f"local-dir:{tmp_path}", (64, 64))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="are 64x32 px, but the student was built for 64x64"):
        build("resnet18", (64, 64))(images((64, 32)))


@pytest.mark.parametrize(("model", "size", "kwargs", "layer"), [case[:4] for case in EXPORTS])
@pytest.mark.parametrize("dense", [False, True])
def test_plain_timm_opens_the_saved_backbone_with_equal_features(
    model, size, kwargs, layer, dense, tmp_path
):
    student = build(model, size, dense=dense, layers=[layer], kwargs=kwargs).eval()
    save_for_hf(student.backbone, tmp_path, **student.backbone_config())
    x = images(size)
    with torch.no_grad():
        logits, maps = student(x)
    name = f"local-dir:{tmp_path}"
    normalised = (x - student.mean) / student.std

    plain = timm.create_model(name, pretrained=True).eval()
    assert plain.state_dict().keys() == student.backbone.state_dict().keys()
    new_head = timm.create_model(name, pretrained=True, num_classes=7).eval()
    features_only = timm.create_model(name, pretrained=True, features_only=True).eval()
    index = [info["module"] for info in student.backbone.feature_info].index(layer)
    last = timm.create_model(name, pretrained=True, features_only=True, out_indices=[index]).eval()
    with torch.no_grad():
        features = student.backbone.forward_features(normalised)
        assert torch.equal(plain.forward_features(normalised), features)
        assert torch.equal(new_head.forward_features(normalised), features)
        assert new_head(normalised).shape == (2, 7)
        assert len(features_only(normalised)) > 0
        assert torch.equal(last(normalised)[0], maps[layer])
        if not dense:
            assert torch.equal(plain(normalised), logits)


@pytest.mark.parametrize(
    ("model", "size", "input_size"),
    [("resnet18", (32, 32), (64, 96)), ("vit_tiny_patch16_224", (48, 80), None)],
)
def test_saved_config_makes_timms_transform_the_students_own(model, size, input_size, tmp_path):
    student = build(model, size, input_size=input_size).eval()
    save_for_hf(student.backbone, tmp_path, **student.backbone_config())
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    config = resolve_data_config(model=plain)
    assert tuple(config["input_size"]) == (3, *(input_size or size))
    assert tuple(config["mean"]) == pytest.approx(student.mean.flatten().tolist())
    assert tuple(config["std"]) == pytest.approx(student.std.flatten().tolist())

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    x = create_transform(**config, is_training=False)(Image.fromarray(pixels))[None]
    with torch.no_grad():
        logits, _ = student(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
        # PIL rounds the resized image to whole grey levels.
        torch.testing.assert_close(plain(x), logits, atol=1e-2, rtol=1e-2)


def test_backbone_of_a_folder_is_a_student_at_another_size(tmp_path):
    first = build("vit_tiny_patch16_224", (32, 32), kwargs={"patch_size": 8})
    save_for_hf(first.backbone, tmp_path, **first.backbone_config())
    second = build(f"local-dir:{tmp_path}", (48, 64), pretrained=True, layers=["blocks.11"])
    assert torch.equal(
        first.backbone.blocks[0].attn.qkv.weight, second.backbone.blocks[0].attn.qkv.weight
    )
    assert second(images((48, 64)))[1]["blocks.11"].shape == (2, 192, 6, 8)


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"in_chans": 1}, "in_chans is always 3; leave it out"),
        ({"features_only": True}, "features_only is not needed"),
        ({"drop_path_rate": 3}, "drop_path_rate must be from 0 to below 1, got 3"),
        ({"drop_rate": float("nan")}, "drop_rate must be from 0 to below 1, got nan"),
        ({"act_layer": "foo"}, "does not accept {'act_layer': 'foo'}: timm has no 'foo'"),
    ],
)
def test_arguments_that_are_not_the_users_or_out_of_range_are_refused(kwargs, line):
    with pytest.raises(ValueError, match=line):
        Student("resnet18", classes=3, dense=False, image_size=(32, 32), kwargs=kwargs)
