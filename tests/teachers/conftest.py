"""Small models of every family, saved in the layout that people have them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import timm
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from torch import Tensor

from distill.teacher import member_factory
from teachers.diffusers_unet import diffusers_unet
from teachers.dit import dit
from teachers.ensemble import ensemble
from teachers.flow import flow
from teachers.guided_diffusion import guided_diffusion
from teachers.stable_diffusion import stable_diffusion
from teachers.timm_model import timm_model
from tests.teachers import pipelines


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads cost more than they bring on tensors this small."""
    torch.set_num_threads(1)


class Case(NamedTuple):
    """One family in the contract suite.

    Attributes:
        save: writes a small random model, trained as far as anybody can see, into a folder, and
            returns the `path` that a recipe would give.
        teacher: the factory that recipes name.
        layers: some of its layers, not in the order in which they run.
        size: side of the images that it is tested with.
        options: further arguments of the factory.
        single_network: whether it is a `DiffusionTeacher` of one family.
    """

    save: Callable[[Path], str]
    teacher: Callable[..., Any]
    layers: Sequence[str]
    size: int
    options: Mapping[str, Any] = MappingProxyType({})
    single_network: bool = True

    def build(self, path: str, **view: Any) -> Any:
        return self.teacher(path, **{"layers": self.layers, **self.options, **view})

    def images(self, count: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand((count, 3, self.size, self.size), generator=generator)


def save_pixel_unet(folder: Path) -> str:
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction")
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return str(folder)


def save_dit(folder: Path) -> str:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    scheduler = DDIMScheduler(num_train_timesteps=100)
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(folder)
    return str(folder)


def guided_shapes(
    widths: Sequence[int] = (32, 64),
    attention: Sequence[bool] = (False, True),
    res_blocks: int = 1,
    scale_shift: bool = True,
    updown: bool = True,
    out_channels: int = 6,
) -> dict[str, tuple[int, ...]]:
    """The tensors of a guided-diffusion UNet, by the rules that OpenAI's files are named by."""
    shapes: dict[str, tuple[int, ...]] = {}
    top, embedding, levels = widths[0], 4 * widths[0], len(widths)

    def tensor(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def residual(name: str, taken: int, given: int) -> None:
        tensor(f"{name}.in_layers.0", taken)
        tensor(f"{name}.in_layers.2", given, taken, 3, 3)
        tensor(f"{name}.emb_layers.1", (1 + scale_shift) * given, embedding)
        tensor(f"{name}.out_layers.0", given)
        tensor(f"{name}.out_layers.3", given, given, 3, 3)
        if taken != given:
            tensor(f"{name}.skip_connection", given, taken, 1, 1)

    def attend(name: str, channels: int) -> None:
        tensor(f"{name}.norm", channels)
        tensor(f"{name}.qkv", 3 * channels, channels, 1)
        tensor(f"{name}.proj_out", channels, channels, 1)

    tensor("time_embed.0", embedding, top)
    tensor("time_embed.2", embedding, embedding)
    tensor("input_blocks.0.0", top, 3, 3, 3)
    given = [top]
    for level, width in enumerate(widths):
        for _ in range(res_blocks):
            residual(f"input_blocks.{len(given)}.0", given[-1], width)
            if attention[level]:
                attend(f"input_blocks.{len(given)}.1", width)
            given.append(width)
        if level < levels - 1:
            if updown:
                residual(f"input_blocks.{len(given)}.0", width, width)
            else:
                tensor(f"input_blocks.{len(given)}.0.op", width, width, 3, 3)
            given.append(width)
    residual("middle_block.0", width, width)
    attend("middle_block.1", width)
    residual("middle_block.2", width, width)
    channels, block = width, 0
    for level in reversed(range(levels)):
        width = widths[level]
        for index in range(res_blocks + 1):
            residual(f"output_blocks.{block}.0", channels + given.pop(), width)
            if attention[level]:
                attend(f"output_blocks.{block}.1", width)
            if level and index == res_blocks:
                last = f"output_blocks.{block}.{1 + attention[level]}"
                residual(last, width, width) if updown else tensor(
                    f"{last}.conv", width, width, 3, 3
                )
            channels, block = width, block + 1
    tensor("out.0", top)
    tensor("out.2", out_channels, top, 3, 3)
    return shapes


def guided_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors of those shapes, as large as in a network that has been trained."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return values / math.prod(shape[1:]) ** 0.5
        return 0.1 * values + (name.endswith(".weight"))  # norms: near 1; biases: near 0

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def save_guided_unet(folder: Path) -> str:
    folder.mkdir()
    torch.save(guided_state(guided_shapes()), folder / "model.pt")
    return str(folder / "model.pt")


@pytest.fixture(scope="session")
def saver() -> Callable[[str], Callable[[Path], str]]:
    """From a family's name to its `Case.save`."""
    return lambda name: CASES[name].save


@pytest.fixture(scope="session")
def guided() -> Any:
    """`shapes` and `state`, the two functions above."""
    return SimpleNamespace(shapes=guided_shapes, state=guided_state)


def save_vit(folder: Path) -> str:
    """For one size alone, as timm's ViTs are; a class token and two registers."""
    vit = timm.create_model(
        "test_vit3", img_size=48, patch_size=8, depth=3, class_token=True, reg_tokens=2
    )
    timm.models.save_for_hf(vit, str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def save_ensemble(folder: Path) -> str:
    save_pixel_unet(folder / "unet")
    save_vit(folder / "vit")
    return str(folder)


def build_ensemble(path: str, **view: Any) -> Any:
    members = {
        "ddpm": {"name": "diffusers_unet", "path": f"{path}/unet"},
        "vit": {"name": "timm", "path": f"local-dir:{path}/vit"},
    }
    return ensemble("", members=members, factory_of=member_factory, **view)


CASES = {
    "diffusers_unet": Case(
        save_pixel_unet,
        diffusers_unet,
        ("up_blocks.0", "mid_block", "down_blocks.1.resnets.0"),
        16,
    ),
    "sd1": Case(
        pipelines.save_sd1,
        stable_diffusion,
        ("up_blocks.0", "down_blocks.1.attentions.0.transformer_blocks.0", "mid_block"),
        16,
    ),
    "sd2": Case(pipelines.save_sd2, stable_diffusion, ("up_blocks.0", "mid_block"), 16),
    "sdxl": Case(
        pipelines.save_sdxl, stable_diffusion, ("up_blocks.0", "mid_block", "down_blocks.0"), 16
    ),
    "sd3": Case(pipelines.save_sd3, flow, ("transformer_blocks.1", "transformer_blocks.0"), 16),
    "flux": Case(
        pipelines.save_flux, flow, ("single_transformer_blocks.1", "transformer_blocks.0"), 16
    ),
    "dit": Case(save_dit, dit, ("transformer_blocks.1", "transformer_blocks.0.attn1"), 16),
    "guided_diffusion": Case(
        save_guided_unet,
        guided_diffusion,
        ("output_blocks.1", "middle_block", "input_blocks.2"),
        16,
        {"head_channels": 16},
    ),
    "timm": Case(save_vit, timm_model, ("blocks.1", "blocks.0.attn", "blocks.0"), 32),
    "ensemble": Case(
        save_ensemble,
        build_ensemble,
        ("ddpm/up_blocks.0+vit/blocks.1", "ddpm/mid_block", "vit/blocks.0+ddpm/mid_block"),
        16,
        single_network=False,
    ),
}


@pytest.fixture(scope="session", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(case, path), once a family; the files are for reading only."""
    case = CASES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case, case.save(tmp_path_factory.mktemp(request.param) / "tiny")


@pytest.fixture
def case(saved: Any) -> Case:
    """The family under test."""
    return saved[0]


@pytest.fixture
def path(saved: Any) -> str:
    """Where its small model lies."""
    return saved[1]
