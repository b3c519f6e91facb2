"""What is special about SD3 and Flux: text-free inputs, and image tokens as maps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers import FluxTransformer2DModel as Flux
from diffusers import SD3Transformer2DModel as SD3
from torch import Tensor

from teachers.flow import FlowTransformer, flow
from tests.teachers import pipelines

TIMESTEPS = torch.tensor([0, 999, 400])
SD3_LAYERS = ("transformer_blocks.1", "transformer_blocks.0")
FLUX_LAYERS = ("single_transformer_blocks.1", "transformer_blocks.0")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def images(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand((3, 3, height, width), generator=torch.Generator().manual_seed(1))


def save_schnell(folder: Path) -> str:
    return pipelines.save_flux(folder, guidance_embeds=False)


SAVE = {"sd3": pipelines.save_sd3, "dev": pipelines.save_flux, "schnell": save_schnell}


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
    return lambda name: Path(shutil.copytree(paths[name], tmp_path / name))


def fails(path: Path | str, kind: type[Exception], pattern: str, **settings: Any) -> None:
    """Building raises `kind` with one line that matches."""
    with pytest.raises(kind, match=pattern) as caught:
        flow(str(path), **{"layers": ("transformer_blocks.0",), **settings})
    assert "\n" not in str(caught.value).strip()


def noised_latents(path: str) -> tuple[Tensor, Tensor]:
    """x_t (3, 4, 8, 12), and sigma (3,), by diffusers alone."""
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
    mean = vae.encode(2 * images() - 1).latent_dist.mean
    latents = (mean - 0.1) * 1.5  # shift and scale of its config
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
    times = scheduler.timesteps.flip(0)[TIMESTEPS]  # its own run from much noise to little
    noise = torch.randn(latents.shape, generator=seeded())
    return scheduler.scale_noise(latents, times, noise), times / 1000


def kept_outputs(network: Any, layers: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for name in layers:
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    return outputs


def assert_maps(path: str, layers: Any, outputs: dict[str, Any]) -> None:
    """The teacher's features are the outputs' second tensors, patch (i, j) at i * 6 + j."""
    found = flow(path, layers=layers).features(images(), TIMESTEPS, seeded())
    for name in layers:
        assert found[name].shape == (3, 16, 4, 6)
        _, tokens = outputs[name]  # of the text, of the image
        for i in range(4):
            for j in range(6):
                torch.testing.assert_close(
                    found[name][:, :, i, j], tokens[:, 6 * i + j], rtol=1e-4, atol=1e-5
                )


@torch.no_grad()
def test_sd3_features_are_those_of_its_own_forward_without_text(paths: dict[str, str]) -> None:
    transformer = SD3.from_pretrained(paths["sd3"], subfolder="transformer")
    outputs = kept_outputs(transformer, SD3_LAYERS)
    x, sigmas = noised_latents(paths["sd3"])
    transformer(x, torch.zeros(3, 333, 8), torch.zeros(3, 8), 1000 * sigmas)
    assert_maps(paths["sd3"], SD3_LAYERS, outputs)


@pytest.mark.parametrize("name", ["dev", "schnell"])
@torch.no_grad()
def test_flux_features_are_those_of_its_own_forward_without_text(
    paths: dict[str, str], name: str
) -> None:
    transformer = Flux.from_pretrained(paths[name], subfolder="transformer")
    outputs = kept_outputs(transformer, FLUX_LAYERS)
    x, sigmas = noised_latents(paths[name])
    corners = [(i, j) for i in range(4) for j in range(6)]
    packed = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i, j in corners]
    transformer(
        torch.stack(packed, dim=1),
        torch.zeros(3, 512, 8),
        torch.zeros(3, 8),
        sigmas,
        img_ids=torch.tensor([(0.0, i, j) for i, j in corners]),
        txt_ids=torch.zeros(512, 3),
        guidance=torch.ones(3) if name == "dev" else None,
    )
    assert_maps(paths[name], FLUX_LAYERS, outputs)


def test_text_tokens_are_cut_off_whatever_their_place(paths: dict[str, str]) -> None:
    family, x = FlowTransformer(paths["dev"]), torch.empty(1, 4, 4, 8)
    image = torch.arange(8.0).reshape(1, 8, 1)
    text = torch.full((1, 512, 1), -1.0)
    expected = image.reshape(1, 1, 2, 4)
    for output in (image, (text, image), (image, text), torch.cat([text, image], dim=1)):
        assert torch.equal(family.feature_map(output, x), expected)
    assert family.feature_map((None, image), x).shape == expected.shape  # SD3's last block
    assert family.feature_map(text, x) is text


def test_attention_inside_of_blocks_gives_maps(paths: dict[str, str]) -> None:
    layers = ("single_transformer_blocks.0.attn", "transformer_blocks.0.attn")
    teacher = flow(paths["dev"], layers=layers)
    for feature in teacher.features(images(), TIMESTEPS, seeded()).values():
        assert feature.shape == (3, 16, 4, 6)


def test_text_alone_is_no_layer(paths: dict[str, str]) -> None:
    layer = "transformer_blocks.0.ff_context"
    fails(paths["dev"], ValueError, rf"'{layer}' returns 3 dimensions, not a", layers=(layer,))


def test_schedule_is_the_flow_of_the_scheduler(paths: dict[str, str]) -> None:
    schedule = FlowTransformer(paths["sd3"]).noise_schedule
    assert schedule.prediction_type == "flow"
    half = torch.tensor([499])  # sigma 0.5, which a shift of 3 moves to 0.75
    torch.testing.assert_close(schedule.noise_fraction(half), torch.tensor([0.75]).double())
    torch.testing.assert_close(schedule.network_times(half), torch.tensor([750.0]))


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_random_weights_refresh_the_transformer_alone(paths: dict[str, str], name: str) -> None:
    layers = ("transformer_blocks.0",)
    trained = flow(paths[name], layers=layers)
    fresh = flow(paths[name], layers=layers, random_weights=3)
    expected = trained.parts["vae"].state_dict()
    for key, weight in fresh.parts["vae"].state_dict().items():
        assert torch.equal(weight, expected[key])
    assert not torch.equal(trained.network.proj_out.weight, fresh.network.proj_out.weight)


def test_other_pipelines_are_refused(copied: Any, tmp_path: Path) -> None:
    folder = copied("sd3")
    index = folder / "model_index.json"
    pipelines.edit(index, transformer=["diffusers", "PixArtTransformer2DModel"])
    pattern = r"'PixArtTransformer2DModel'\]; it must be .* SD3Tr\w+ or FluxTr\w+$"
    fails(folder, ValueError, pattern)
    for wrong in (None, 7, "SD3Transformer2DModel"):
        pipelines.edit(index, transformer=wrong)
        pattern = rf"model_index\.json: transformer is {wrong!r}; it must be diffusers' "
        fails(folder, ValueError, pattern)
    index.unlink()
    fails(folder, FileNotFoundError, r"there is no .*/model_index\.json; give a local folder")


def test_flux_that_sees_more_than_the_latents_is_refused(copied: Any) -> None:
    folder = copied("dev")
    pipelines.edit(folder / "transformer" / "config.json", in_channels=32)
    fails(
        folder,
        ValueError,
        r"has 32 input channels, but the autoencoder has 16; .* only the latents",
    )


def test_scheduler_that_is_no_flow_is_refused(copied: Any) -> None:
    folder = copied("sd3")
    pipelines.ddim("epsilon").save_pretrained(folder / "scheduler")
    fails(
        folder, ValueError, r"scheduler_config\.json is not a flow-matching scheduler; it must be a"
    )


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_missing_component_is_named(copied: Any, part: str) -> None:
    folder = copied("dev")
    shutil.rmtree(folder / part)
    fails(folder, FileNotFoundError, rf"there is no .*/{part}/\w+\.json; give a local folder")


def test_unknown_layer_and_image_that_does_not_fit_are_refused(paths: dict[str, str]) -> None:
    path = paths["sd3"]
    fails(path, ValueError, r"mean 'transformer_blocks\.1'\?", layers=("transformer_block.1",))
    fails(
        path, ValueError, r"18x16 does not suit .* divisible by 4; try 16x16", image_size=(18, 16)
    )
    # 16 by 32 patches: which tokens are the image's could not be told from their number
    fails(paths["dev"], ValueError, r"64x128 gives 512 patches, as many as", image_size=(64, 128))
    fails(path, ValueError, r"68x68 is larger than the 64x64 that this teacher", image_size=68)
