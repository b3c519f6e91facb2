"""What is special about Stable Diffusion: the latents, the prompts, and the folders' mistakes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teachers.stable_diffusion import TextUNet, stable_diffusion
from tests.teachers import pipelines

LAYERS = ("up_blocks.0", "mid_block", "down_blocks.1.attentions.0")
TIMESTEPS = torch.tensor([0, 99, 40, 40])
SAVE = {"sd1": pipelines.save_sd1, "sd2": pipelines.save_sd2, "sdxl": pipelines.save_sdxl}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def images(height: int = 16, width: int = 16) -> Tensor:
    return torch.rand((4, 3, height, width), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the small pipelines lie, by SAVE's names; for reading only."""
    root = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture
def copied(paths: dict[str, str], tmp_path: Path) -> Any:
    """A pipeline of one's own, to break."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(paths[name], tmp_path / name))

    return copy


def build(path: Path | str, **settings: Any) -> Any:
    return stable_diffusion(str(path), **{"layers": LAYERS, **settings})


def features(teacher: Any, labels: Tensor | None = None) -> dict[str, Tensor]:
    return dict(teacher.features(images(), TIMESTEPS, seeded(), labels))


def same(one: dict[str, Tensor], other: dict[str, Tensor], rows: Any = slice(None)) -> bool:
    """To rounding, which depends on what else is in the batch."""
    return all(torch.allclose(one[k][rows], other[k][rows], rtol=1e-5, atol=1e-6) for k in one)


def fails(path: Path | str, kind: type[Exception], pattern: str, **settings: Any) -> None:
    """Building raises `kind` with one line that matches."""
    with pytest.raises(kind, match=pattern) as caught:
        build(path, **settings)
    assert "\n" not in str(caught.value).strip()


@torch.no_grad()
def reference(path: str, prompt: str) -> dict[str, Tensor]:
    """The features by the pipeline's own components, in diffusers' own words."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(path)
    pixels = images(16, 32)
    latents = pipeline.vae.encode(2 * pixels - 1).latent_dist.mean
    latents = latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=seeded())
    x = pipeline.scheduler.add_noise(latents, noise, TIMESTEPS)
    added = None
    if hasattr(pipeline, "text_encoder_2"):
        shown, unshown, pooled, unpooled = pipeline.encode_prompt(prompt or "a cat")
        tokens, pooled = (shown, pooled) if prompt else (unshown, unpooled)
        sizes = torch.tensor([16.0, 32.0, 0.0, 0.0, 16.0, 32.0]).repeat(4, 1)
        added = {"text_embeds": pooled.repeat(4, 1), "time_ids": sizes}
    else:
        tokens, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    maps = {}
    for name in LAYERS:

        def hook(module: Any, args: Any, output: Any, name: str = name) -> None:
            maps[name] = output[0] if isinstance(output, tuple) else output

        pipeline.unet.get_submodule(name).register_forward_hook(hook)
    pipeline.unet(x, TIMESTEPS, tokens.repeat(4, 1, 1), added_cond_kwargs=added)
    return maps


@pytest.mark.parametrize("prompt", ["", "a cat"])
@pytest.mark.parametrize("name", SAVE)
def test_features_are_those_of_the_pipelines_own_components(
    paths: dict[str, str], name: str, prompt: str
) -> None:
    teacher = build(paths[name], prompt=prompt)
    found = teacher.features(images(16, 32), TIMESTEPS, seeded())
    expected = reference(paths[name], prompt)
    for layer in LAYERS:
        # the schedule is kept in float64 here and in float32 there
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_folder_of_half_weights_alone_loads(
    paths: dict[str, str], name: str, tmp_path: Path
) -> None:
    """As `save_pretrained(variant="fp16")` of a pipeline writes it; here its numbers are whole."""
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(paths[name]).save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16." in file.name for file in tmp_path.rglob("*.safetensors"))
    assert same(features(build(tmp_path)), features(build(paths[name])))


def test_latents_are_normalised_by_channel_where_the_autoencoder_says_so(
    paths: dict[str, str], copied: Any
) -> None:
    folder, pixels = copied("sdxl"), 2 * images() - 1
    mean, std = [0.1, 0.2, -0.3, 0.4], [2.0, 4.0, 5.0, 0.5]
    pipelines.edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    plain, scaled = (TextUNet(str(path)) for path in (paths["sdxl"], folder))
    latents = plain.encode(plain.load(None), pixels)
    factor = plain.vae_config["scaling_factor"]
    centred = latents - factor * torch.tensor(mean)[:, None, None]
    expected = centred / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(scaled.encode(scaled.load(None), pixels), expected)


def test_prediction_type_is_the_schedulers(paths: dict[str, str]) -> None:
    kinds = {name: TextUNet(path).noise_schedule.prediction_type for name, path in paths.items()}
    assert kinds == {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}


@pytest.mark.parametrize("name", SAVE)
def test_text_encoders_are_gone_after_loading(paths: dict[str, str], name: str) -> None:
    teacher = build(paths[name])
    assert set(teacher.parts) == {"network", "vae", "prompts"}
    origins = {type(module).__module__.split(".")[0] for module in teacher.parts.modules()}
    assert "transformers" not in origins
    assert list(teacher.parts["prompts"].parameters()) == []
    assert teacher.parts["prompts"].tokens.shape[:2] == (1, pipelines.PROMPT_LENGTH)


def test_empty_prompt_of_sdxl_is_zeros_only_where_its_index_says_so(
    paths: dict[str, str], copied: Any
) -> None:
    prompts = build(paths["sdxl"], class_prompts=["a cat", ""]).parts["prompts"]
    for embedded in (prompts.tokens, prompts.pooled):
        assert [bool(row.any()) for row in embedded] == [False, True, False]
    folder = copied("sdxl")
    pipelines.edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert build(folder).parts["prompts"].tokens.all()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_each_image_gets_the_prompt_of_its_label(paths: dict[str, str], name: str) -> None:
    classes = ["a cat", "dog"]
    teacher = build(paths[name], prompt="any", class_prompts=classes)
    mixed = features(teacher, torch.tensor([1, 0, -1, 1]))
    plain, cats, dogs = (features(build(paths[name], prompt=p)) for p in ("any", *classes))
    for row, expected in enumerate((dogs, cats, plain, dogs)):
        assert same(mixed, expected, row)
    assert not same(cats, dogs)
    assert not same(cats, plain)


def test_no_labels_and_negative_ones_give_the_prompt_of_all(paths: dict[str, str]) -> None:
    teacher, plain = build(paths["sd1"], class_prompts=["a cat"]), build(paths["sd1"])
    expected = features(plain)
    assert same(features(teacher), expected)
    assert same(features(teacher, torch.full((4,), -1)), expected)
    assert not same(features(teacher, torch.zeros(4, dtype=torch.int64)), expected)


def test_labels_play_no_part_without_class_prompts(paths: dict[str, str]) -> None:
    teacher = build(paths["sd1"])
    assert same(features(teacher, torch.tensor([1000, 0, -1, 7])), features(teacher))


def test_label_beyond_the_class_prompts_is_refused(paths: dict[str, str]) -> None:
    teacher = build(paths["sd1"], class_prompts=["a cat", "dog"])
    with pytest.raises(ValueError, match=r"label 2 is not one of the teacher's classes, 0\.\.1"):
        features(teacher, torch.tensor([0, 2, 1, 0]))


def test_labels_do_not_break_a_compiled_graph(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **rest: compile(f, backend="eager", fullgraph=True, **rest)
    )
    torch._dynamo.reset()
    plain, compiled = (
        build(paths["sdxl"], class_prompts=["a cat", "dog"], compile=c) for c in (False, True)
    )
    labels = torch.tensor([1, 0, -1, 1])
    assert same(features(compiled, labels), features(plain, labels))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_random_weights_refresh_the_unet_alone(paths: dict[str, str], name: str) -> None:
    trained, fresh = build(paths[name]), build(paths[name], random_weights=3)
    for part in ("vae", "prompts"):
        expected = trained.parts[part].state_dict()
        for key, weight in fresh.parts[part].state_dict().items():
            assert torch.equal(weight, expected[key])
    assert not torch.equal(trained.network.conv_in.weight, fresh.network.conv_in.weight)


def test_prompts_are_cast_and_fingerprinted_with_the_rest(paths: dict[str, str]) -> None:
    teacher = build(paths["sd1"], prompt="a cat", dtype=torch.bfloat16)
    assert teacher.parts["prompts"].tokens.dtype == torch.bfloat16
    assert teacher.fingerprint == build(paths["sd1"], prompt="a cat").fingerprint
    assert teacher.fingerprint != build(paths["sd1"]).fingerprint


def test_autoencoder_is_upcast_from_float16_where_its_config_asks_for_it(copied: Any) -> None:
    folder = copied("sd1")
    exact = features(build(folder))
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        pipelines.edit(folder / "vae" / "config.json", force_upcast=upcast)
        teacher = build(folder, dtype=torch.float16)
        for name, feature in features(teacher).items():
            assert (feature - exact[name]).norm() < 0.02 * exact[name].norm()
        assert teacher.parts["vae"].dtype == dtype
        assert teacher.network.dtype == torch.float16


@pytest.mark.parametrize(("sample", "pixels"), [(8, (16, 16)), ([8, 4], (16, 8)), (None, None)])
def test_the_images_it_was_trained_on_are_told_in_pixels(
    copied: Any, sample: Any, pixels: Any
) -> None:
    folder = copied("sd1")
    pipelines.edit(folder / "unet" / "config.json", sample_size=sample)
    assert stable_diffusion(str(folder), layers=()).family.image_size == pixels


def test_layers_are_listed_without_any_weights(copied: Any) -> None:
    folder = copied("sdxl")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    table = stable_diffusion(str(folder), class_prompts=["a cat"], layers=()).layer_table((16, 32))
    assert [(layer.name, layer.channels, layer.reduction) for layer in table] == [
        ("conv_in", 8, 2),
        ("down_blocks.0", 8, 4),
        ("down_blocks.1", 16, 4),
        ("mid_block", 16, 4),
        ("up_blocks.0", 16, 2),
        ("up_blocks.1", 8, 2),
    ]


def test_image_tokens_inside_a_transformer_become_a_map_and_texts_do_not(
    paths: dict[str, str],
) -> None:
    family, x = TextUNet(paths["sd1"]), torch.empty(1, 4, 4, 12)
    tokens = torch.arange(12.0).reshape(1, 12, 1)  # 2 by 6, each side a half of the latents'
    expected = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]).float()
    assert torch.equal(family.feature_map((tokens,), x)[0, 0], expected)
    for count in (11, 77):
        assert family.feature_map(torch.empty(1, count, 8), x).shape == (1, count, 8)


def test_vocabulary_may_be_the_hubs_two_files(paths: dict[str, str], copied: Any) -> None:
    folder = copied("sd1")
    shutil.rmtree(folder / "tokenizer")
    pipelines.write_tokenizer(folder / "tokenizer")
    expected = build(paths["sd1"], prompt="a cat sat").fingerprint
    assert build(folder, prompt="a cat sat").fingerprint == expected


@pytest.mark.parametrize(
    "part", ["unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer"]
)
def test_missing_component_is_named(copied: Any, part: str) -> None:
    folder = copied("sdxl")
    shutil.rmtree(folder / part)
    fails(folder, FileNotFoundError, rf"there is no .*/{part}/\w+\.json; give a local folder")


def test_missing_transformers_names_the_extra(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(paths["sd1"], ValueError, r"not installed; .*: pip install 'diffusion-distill\[text\]'")


def test_a_tokenizer_without_a_limit_reads_what_its_encoder_reads(
    paths: dict[str, str], copied: Any
) -> None:
    folder = copied("sd1")
    pipelines.edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=int(1e30))
    assert same(features(build(folder)), features(build(paths["sd1"])))
    fails(folder, ValueError, r"has 14 tokens, .* reads at most 11", prompt="abcdefabcdef")


def test_configs_that_do_not_fit_together_are_one_line(copied: Any) -> None:
    folder = copied("sd1")
    pipelines.edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    fails(folder, ValueError, r"tokenizer_config.json: model_max_length must be a number, got None")
    folder = copied("sdxl")
    pipelines.edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=5)
    fails(folder, ValueError, r"its configs do not fit together, or do not allow images of 8x8 \(")


def test_prompts_that_are_none_are_refused(paths: dict[str, str]) -> None:
    path = paths["sd1"]
    fails(
        path,
        ValueError,
        r"class_prompts must be a list with one prompt per class, got \[\]",
        class_prompts=[],
    )
    fails(path, ValueError, r"class_prompts must be a list .* got 'cat'", class_prompts="cat")
    fails(path, ValueError, r"prompt must be text, got True", class_prompts=["a", True])
    fails(
        path,
        ValueError,
        r"prompt 'abcdefabcdef' has 14 tokens, .* reads at most 11",
        prompt="abcdefabcdef",
    )


def test_other_kinds_of_unet_are_refused(copied: Any) -> None:
    folder = copied("sd1")
    config = folder / "unet" / "config.json"
    pipelines.edit(config, in_channels=9)
    fails(folder, ValueError, r"the UNet has 9 input channels, but the autoencoder has 4")
    pipelines.edit(config, in_channels=4, class_embed_type="timestep")
    fails(folder, ValueError, r"class_embed_type is 'timestep'; a teacher's UNet must be")
    pipelines.edit(config, class_embed_type=None, addition_embed_type="text")
    fails(folder, ValueError, r"addition_embed_type is 'text'; a teacher's UNet must be")
    pipelines.edit(config, addition_embed_type=None, cross_attention_dim=[8, 8])
    fails(
        folder,
        ValueError,
        r"unet/config\.json: cross_attention_dim must be one number.* got \[8, 8\]",
    )
    vae = folder / "vae" / "config.json"
    pipelines.edit(vae, latents_mean=[0.1, 0.2])
    fails(
        folder,
        ValueError,
        r"vae/config\.json: latents_mean has 2 numbers, but the latents have 4 channels",
    )
    pipelines.edit(vae, latents_mean=None, scaling_factor=None)
    fails(folder, ValueError, r"vae/config\.json: scaling_factor must be a number, got None")
    pipelines.edit(vae, in_channels=1)
    fails(folder, ValueError, r"the autoencoder has 1 input channels; a teacher needs 3")


def test_unknown_layer_and_image_that_does_not_divide_are_refused(paths: dict[str, str]) -> None:
    fails(paths["sd1"], ValueError, r"did you mean 'mid_block'\?", layers=("mid_blok",))
    pattern = r"17x16 does not suit .* divisible by 2; try 16x16"
    fails(paths["sd1"], ValueError, pattern, image_size=(17, 16))
    with pytest.raises(ValueError, match=pattern):
        build(paths["sd1"]).features(images(17, 16), TIMESTEPS)


def test_any_size_will_do_that_the_autoencoder_divides(paths: dict[str, str]) -> None:
    inside = "up_blocks.0.attentions.0.transformer_blocks.0"
    teacher = build(paths["sd1"], layers=("mid_block", inside, "up_blocks.1"))
    assert [teacher.reductions[name] for name in ("mid_block", "up_blocks.1")] == [4, 2]
    maps = teacher.features(images(18, 22), TIMESTEPS, seeded())
    shapes = [tuple(maps[name].shape[-2:]) for name in teacher.layers]
    assert shapes == [(5, 6), tuple(maps[inside].shape[-2:]), (9, 11)]
    assert shapes[1] in {(5, 6), (9, 11)}
