"""Small models of every family, saved in the layout that people have them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from teachers.diffusers_unet import diffusers_unet


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
    """

    save: Callable[[Path], str]
    teacher: Callable[..., Any]
    layers: Sequence[str]
    size: int
    options: Mapping[str, Any] = MappingProxyType({})

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


CASES = {
    "diffusers_unet": Case(
        save_pixel_unet,
        diffusers_unet,
        ("up_blocks.0", "mid_block", "down_blocks.1.resnets.0"),
        16,
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
