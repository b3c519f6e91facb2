"""What is special about timm's models: tokens, sizes, normalisation, where weights come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from teachers.anatomy import LayerError
from teachers.diffusion import DiffusionTeacher
from teachers.timm_model import timm_model

MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
LAYER = ("blocks.1",)
ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for 48 px, as timm saves it: a class token, two registers and patches of 8 px."""
    root = tmp_path_factory.mktemp("timm") / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(
            "test_vit3", img_size=48, patch_size=8, depth=2, class_token=True, reg_tokens=2
        )
    colours = {"mean": MEAN, "std": STD}
    timm.models.save_for_hf(vit, str(root), safe_serialization=True, data_config=colours)
    return root


@pytest.fixture
def path(folder: Path) -> str:
    return f"local-dir:{folder}"


@pytest.fixture
def images() -> Tensor:
    return torch.rand((2, 3, 32, 16), generator=torch.Generator().manual_seed(1))


def by_timm(path: str, images: Tensor, **kwargs: Any) -> Tensor:
    """The patches' map after the last block by timm alone, its own normalisation done by hand."""
    vit = timm.create_model(path, pretrained=True, **kwargs).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        maps = vit.forward_intermediates(
            (images - mean) / std, indices=[1], intermediates_only=True, norm=False
        )
    return maps[0]


def test_tokens_become_a_map_without_class_token_and_registers(path: str, images: Tensor) -> None:
    teacher = timm_model(path, layers=LAYER)
    feature = teacher.features(images, ZERO)["blocks.1"]
    assert feature.shape == (2, 96, 4, 2)
    expected = by_timm(path, images, dynamic_img_size=True)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


def test_image_size_is_what_the_network_is_built_for(path: str, images: Tensor) -> None:
    teacher = timm_model(path, layers=LAYER, image_size=(32, 64))
    assert teacher.network.get_parameter("pos_embed").shape == (1, 4 * 8 + 3, 96)
    resized = F.interpolate(images, (32, 64), mode="bilinear", antialias=True)
    expected = by_timm(path, resized, img_size=(32, 64), dynamic_img_size=False)
    feature = teacher.features(images, ZERO)["blocks.1"]
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


def test_maps_with_the_channels_last_are_turned(path: str, images: Tensor) -> None:
    teacher = timm_model(path, layers=("patch_embed", "patch_embed.proj"))
    turned, plain = teacher.features(images, ZERO).values()
    assert torch.equal(turned, plain)
    tiny = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    swin = timm_model(
        "swin_tiny_patch4_window7_224",
        random_weights=0,
        kwargs=tiny,
        layers=("layers.0", "layers.1"),
        image_size=32,
    )
    shapes = [tuple(x.shape) for x in swin.features(images, ZERO).values()]
    assert shapes == [(2, 8, 8, 8), (2, 16, 4, 4)]


def test_inner_maps_are_read_by_the_aspect_of_the_image(images: Tensor) -> None:
    tiny = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    layers = ("stages.0.blocks.0.mlp", "stages.0.blocks.0.conv_dw")
    teacher = timm_model("convnext_tiny", random_weights=0, kwargs=tiny, layers=layers)
    wide = torch.cat([images] * 4, dim=3)
    assert teacher.channels == dict.fromkeys(layers, 8)
    assert teacher.reductions == dict.fromkeys(layers, 4)
    shapes = [tuple(x.shape) for x in teacher.features(wide, ZERO).values()]
    assert shapes == [(2, 8, 8, 16)] * 2


def swin(*layers: str) -> DiffusionTeacher:
    kwargs = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    name = "swin_tiny_patch4_window7_224"
    return timm_model(name, random_weights=0, kwargs=kwargs, layers=layers, image_size=32)


def test_a_network_of_channels_last_may_have_maps_that_are_not() -> None:
    teacher = swin("patch_embed.proj", "layers.0")
    features = teacher.features(torch.rand(2, 3, 32, 32), ZERO)
    assert [tuple(x.shape) for x in features.values()] == [(2, 16, 8, 8)] * 2
    assert [row.name for row in teacher.layer_table(32)] == ["layers.0", "layers.1"]


def test_windows_are_no_maps() -> None:
    with pytest.raises(LayerError, match=r"attn' returns 4 rows for one image"):
        swin("layers.0.blocks.0.attn")


def test_convnets_give_their_maps(images: Tensor) -> None:
    teacher = timm_model("test_resnet", random_weights=0, layers=("layer1", "layer4"))
    assert [row.name for row in teacher.layer_table(64)] == [f"layer{n}" for n in (1, 2, 3, 4)]
    assert teacher.reductions == {"layer1": 4, "layer4": 32}
    features = teacher.features(torch.cat([images, images], dim=3), ZERO)
    assert [tuple(x.shape[2:]) for x in features.values()] == [(8, 8), (1, 1)]


def test_every_input_is_the_image_itself_seen_once(path: str, images: Tensor) -> None:
    expected = timm_model(path, layers=LAYER, input="clean").features(images, ZERO)["blocks.1"]
    for input in ("noised", "average"):
        teacher = timm_model(path, layers=LAYER, input=input, draws=3)
        passes: list[Any] = []
        teacher.network.register_forward_pre_hook(lambda *call, passes=passes: passes.append(call))
        assert torch.equal(teacher.features(images, ZERO)["blocks.1"], expected)
        assert len(passes) == 1


def test_fingerprint_does_not_depend_on_the_folder(path: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = timm_model(f"local-dir:{tmp_path / 'elsewhere'}", layers=LAYER)
    assert moved.fingerprint == timm_model(path, layers=LAYER).fingerprint
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    other = timm_model(f"local-dir:{tmp_path / 'elsewhere'}", layers=LAYER)
    assert other.fingerprint != moved.fingerprint


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no model 'test_vt'; did you mean .*'test_vit'"):
        timm_model("test_vt", layers=LAYER)


def test_unknown_argument_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=r"does not accept \{'depht': 1\}: .*'depht'"):
        timm_model(path, kwargs={"depht": 1}, layers=LAYER)
    with pytest.raises(ValueError, match=r"does not accept \{'num_heads': 5\}: "):
        timm_model(path, kwargs={"num_heads": 5}, layers=LAYER)


def test_weights_that_are_offline_ask_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"^cannot read the weights of 'test_vit': .*; give 'local-dir:FOLDER'"
    ):
        timm_model("test_vit", layers=LAYER)
    with pytest.raises(
        OSError, match=r"^cannot read the config of 'hf-hub:none/none': .*; give 'local-dir:"
    ):
        timm_model("hf-hub:none/none", layers=LAYER)


def test_broken_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    def fails(words: str, kind: type[Exception] = OSError) -> None:
        with pytest.raises(kind, match=words) as caught:
            timm_model(f"local-dir:{broken}", layers=LAYER)
        assert "\n" not in str(caught.value)

    broken = tmp_path / "broken"
    fails(r"the config of .*config\.json; give 'local-dir:FOLDER'")
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    fails("cannot read the weights of .*broken'")
    save_file({name: x for name, x in tensors.items() if name != "norm.bias"}, weights)
    fails("cannot read the weights of .*broken'")
    save_file(tensors | {"norm.bias": torch.full((96,), torch.nan)}, weights)
    fails(r"norm\.bias has values that are not finite", ValueError)
    weights.unlink()
    fails("the weights of .*No suitable checkpoints")
    config = json.loads((broken / "config.json").read_text())
    for key, wrong, words in (
        ("mean", "x", "mean must be three numbers, got 'x'"),
        ("std", [0, 0, 0], r"std must be three numbers above 0, got \[0, 0, 0\]"),
    ):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | {key: wrong}}
        (broken / "config.json").write_text(json.dumps(changed))
        fails(f"the config of .*broken': {words}", ValueError)
    (broken / "config.json").write_text(json.dumps(config | {"model_args": {"foo": 1}}))
    fails("broken' cannot be built as configured: .*'foo'", ValueError)
    (broken / "config.json").write_text("[]")
    fails("cannot read the config of .*broken'")
    (broken / "config.json").write_text("{")
    fails("cannot read the config of .*broken'")


def test_model_for_one_size_asks_for_image_size(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"image_size must be given; its own is 160"):
        timm_model("test_vit_relpos", random_weights=0, layers=LAYER)
    teacher = timm_model("test_vit_relpos", random_weights=0, layers=LAYER, image_size=32)
    assert teacher.features(images, ZERO)["blocks.1"].shape == (
        2,
        teacher.channels["blocks.1"],
        2,
        2,
    )


def test_networks_that_round_up_take_images_of_their_own_size() -> None:
    # 224 / 64 is no whole number
    teacher = timm_model("levit_128s", random_weights=0, layers=("stages.2",), image_size=224)
    maps = teacher.features(torch.rand(1, 3, 224, 224), torch.tensor([0]))
    assert maps["stages.2"].shape == (1, teacher.channels["stages.2"], 4, 4)


def test_a_model_whose_blocks_give_no_maps_names_what_does() -> None:
    with pytest.raises(ValueError, match=r"no layer 'blocks\.1'; choose from patch_embed1\.proj, "):
        timm_model("coat_lite_tiny", random_weights=0, layers=("blocks.1",), image_size=224)


def test_model_of_grey_images_is_refused() -> None:
    with pytest.raises(ValueError, match="'test_resnet' does not turn RGB images into feature"):
        timm_model("test_resnet", random_weights=0, kwargs={"in_chans": 1}, layers=("layer1",))
