"""What is special about diffusion transformers: latents, tokens, classes, position embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from teachers import loading
from teachers.dit import dit

LAYERS = ("transformer_blocks.0",)
TIMESTEPS = torch.tensor([3, 99, 40])
NULL = 10  # after the classes 0..9 of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, saver: Any) -> Path:
    return Path(saver("dit")(tmp_path_factory.mktemp("dit") / "tiny"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One to break."""
    for file in folder.rglob("*.*"):
        target = tmp_path / "copy" / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def images(height: int = 16, width: int = 16, count: int = 3) -> Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(1))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def tokens(folder: Path, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
    """The first block's output (B, N, C), by diffusers alone and without its forward pass."""
    pipeline = DiTPipeline.from_pretrained(folder)
    x = pipeline.vae.encode(2 * images - 1).latent_dist.mean * 0.5  # its scaling factor
    if noise is not None:
        x = pipeline.scheduler.add_noise(x, noise, TIMESTEPS)
    network = pipeline.transformer
    x = network.pos_embed(x)
    hidden: Tensor = network.transformer_blocks[0](x, timestep=TIMESTEPS, class_labels=labels)
    return hidden


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (12, 32), (8, 4)])
def test_patch_in_row_y_and_column_x_is_at_y_x_for_images_of_any_shape(folder, height, width):
    teacher = dit(str(folder), layers=LAYERS, input="clean")
    x = images(height, width)
    feature = teacher.features(x, TIMESTEPS)[LAYERS[0]]
    expected = tokens(folder, x, torch.full((3,), NULL))
    assert feature.shape == (3, 16, height // 4, width // 4)
    for row in range(height // 4):
        for column in range(width // 4):
            there = expected[:, row * (width // 4) + column]
            torch.testing.assert_close(feature[:, :, row, column], there, rtol=1e-4, atol=1e-5)


def test_noise_is_added_to_the_latents_by_the_pipelines_schedule(folder):
    teacher = dit(str(folder), layers=LAYERS)
    feature = teacher.features(images(), TIMESTEPS, torch.Generator().manual_seed(7))[LAYERS[0]]
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    expected = tokens(folder, images(), torch.full((3,), NULL), noise)
    torch.testing.assert_close(feature.flatten(2).mT, expected, rtol=1e-3, atol=1e-4)


def test_oblong_images_can_be_resized_to_and_counted(folder):
    teacher = dit(str(folder), layers=LAYERS, image_size=(8, 24))
    assert teacher.features(images(), TIMESTEPS)[LAYERS[0]].shape == (3, 16, 2, 6)
    used, whole = teacher.flops(16)
    assert 0 < used < whole
    assert [row.name for row in teacher.layer_table(16)] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ]


def test_labels_count_only_where_asked_for_and_where_there_are_any(folder):
    labels = torch.tensor([4, -1, 9])
    told = torch.tensor([4, NULL, 9])
    deaf = dit(str(folder), layers=LAYERS, input="clean")
    hearing = dit(str(folder), layers=LAYERS, input="clean", class_labels=True)
    without = deaf.features(images(), TIMESTEPS)[LAYERS[0]]
    assert torch.equal(deaf.features(images(), TIMESTEPS, labels=labels)[LAYERS[0]], without)
    assert torch.equal(hearing.features(images(), TIMESTEPS)[LAYERS[0]], without)
    feature = hearing.features(images(), TIMESTEPS, labels=labels)[LAYERS[0]]
    expected = tokens(folder, images(), told)
    torch.testing.assert_close(feature.flatten(2).mT, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(feature[0], without[0])
    torch.testing.assert_close(feature[1], without[1])


def test_a_label_that_is_no_class_of_the_teacher_is_refused(folder):
    teacher = dit(str(folder), layers=LAYERS, class_labels=True)
    with pytest.raises(ValueError, match=r"label 10 is not one of the teacher's classes, 0\.\.9"):
        teacher.features(images(), TIMESTEPS, labels=torch.tensor([0, -1, 10]))


def test_modules_without_tokens_are_no_layers(folder):
    with pytest.raises(ValueError, match="returns 2 dimensions, not a"):
        dit(str(folder), layers=("transformer_blocks.1.norm1.emb",))
    assert dit(str(folder), layers=("transformer_blocks.1.norm1",)).channels == {
        "transformer_blocks.1.norm1": 16  # a tuple, of which the tokens are the first
    }


def test_random_weights_keep_the_trained_vae(folder):
    trained, fresh = (dit(str(folder), layers=LAYERS, random_weights=seed) for seed in (None, 1))
    hashes = [
        {name: loading.weights_hash(part) for name, part in teacher.parts.items()}
        for teacher in (trained, fresh)
    ]
    assert hashes[0]["vae"] == hashes[1]["vae"]
    assert hashes[0]["network"] != hashes[1]["network"]


def test_the_class_name_that_the_published_models_bear_is_taken(folder, copy):
    edit(
        copy / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        cross_attention_dim=None,
        num_vector_embeds=None,
        only_cross_attention=False,
        use_linear_projection=False,
    )
    former = dit(str(copy), layers=LAYERS)
    assert former.fingerprint == dit(str(folder), layers=LAYERS).fingerprint


@pytest.mark.parametrize(
    ("component", "changes", "pattern"),
    [
        (
            "transformer",
            {"_class_name": "PixArtTransformer2DModel"},
            "must describe a DiTTransformer2D",
        ),
        (
            "transformer",
            {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"},
            "does not describe a DiTTransformer2DModel: .*ada_norm_single",
        ),
        ("transformer", {"in_channels": 8}, "latents have 4 channels, but the transformer needs 8"),
        ("vae", {"in_channels": 1}, r"needs 3 \(RGB\)"),
    ],
)
def test_models_that_do_not_fit_are_named(copy, component, changes, pattern):
    edit(copy / component / "config.json", **changes)
    with pytest.raises(ValueError, match=pattern) as caught:
        dit(str(copy), layers=LAYERS)
    assert "\n" not in str(caught.value)


def test_size_that_vae_and_patches_do_not_divide_names_one_that_they_do(folder):
    with pytest.raises(ValueError, match=r"18x16 does not suit .* divisible by 4; try 16x16"):
        dit(str(folder), layers=LAYERS, image_size=(18, 16))


def test_only_what_is_needed_is_fetched(folder, monkeypatch):
    asked = []

    def snapshot(
        hub_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.extend(pattern for pattern in allow_patterns if "safetensors" in pattern)
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    teacher = dit("someone/DiT-tiny", layers=LAYERS)
    assert asked == ["transformer/*.safetensors", "vae/*.safetensors"]
    assert teacher.name == "DiT-tiny"
    assert isinstance(teacher.network, DiTTransformer2DModel)
    assert isinstance(teacher.parts["vae"], AutoencoderKL)
