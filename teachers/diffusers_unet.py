"""diffusers' `UNet2DModel`, unconditional, in pixel space: the DDPM family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from diffusers import UNet2DModel
from torch import Tensor, nn

from teachers import anatomy, loading
from teachers.diffusion import DiffusionTeacher, View
from teachers.tap import first_tensor


def diffusers_unet(
    path: str, *, revision: str | None = None, **view: Unpack[View]
) -> DiffusionTeacher:
    """An unconditional RGB `UNet2DModel`, such as google/ddpm-cifar10-32 or one of your own.

    Args:
        path: a pipeline folder (`unet/` and `scheduler/`, or both flat in it as in the first
            pipelines on the hub), a UNet's folder with the scheduler in it or beside it, or a hub
            id.
        revision: branch, tag or commit, for a hub id.
        view: see `teachers.diffusion.View`; layers are `mid_block`, `up_blocks.1`,
            `down_blocks.2.resnets.0`, ...

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `PixelUNet`.
    """
    return DiffusionTeacher(PixelUNet(path, revision), **view)


class PixelUNet:
    """The family of `diffusers_unet`, with its arguments (a `diffusion.Family`).

    Raises:
        OSError: a folder or file is missing, or the hub does not have it.
        ValueError: not an unconditional RGB `UNet2DModel`, one that works on an autoencoder's
            latents, or an unsupported schedule.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        root = loading.pipeline_folder(path, revision)
        self.folder = root / "unet" if (root / "unet").is_dir() else root
        self.name = Path(path).name
        where = self.folder / "config.json"
        if index := _autoencoder(self.folder):
            raise ValueError(_of_latents(index))
        config = loading.read_config(self.folder, UNet2DModel)
        if config["in_channels"] != 3:
            raise ValueError(
                f"{where}: the UNet has {config['in_channels']} input channels; "
                "a teacher needs 3 (RGB)"
            )
        if config["class_embed_type"] is not None or config["num_class_embeds"] is not None:
            raise ValueError(f"{where}: the UNet is class-conditional; it must be unconditional")
        if config["time_embedding_type"] == "fourier":
            raise ValueError(
                f"{where}: time_embedding_type fourier takes the logarithm of the timestep, which "
                "is undefined for t=0; it must be positional or learned"
            )
        scheduler = _scheduler_folder(self.folder)
        self.noise_schedule = loading.load_schedule(scheduler)
        known = config["num_train_timesteps"] or 0
        if config["time_embedding_type"] == "learned" and known < len(self.noise_schedule):
            raise ValueError(
                f"{where}: the UNet has learned embeddings of {known} timesteps, but the scheduler "
                f"has {len(self.noise_schedule)}"
            )
        self.config = config
        self.configs: Mapping[str, Any] = {
            "unet": config,
            "scheduler": loading.without_bookkeeping(scheduler / "scheduler_config.json"),
        }
        self.multiple = 2 ** (len(config["block_out_channels"]) - 1)  # each level but one halves
        self.coarsest = self.multiple
        side = config["sample_size"]
        if isinstance(side, list | tuple) and len(side) != 2:
            raise ValueError(
                f"{where}: sample_size must be a side, or height and width, got {side}"
            )
        self.image_size = side and anatomy.height_width(side)
        self.classes = 0

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: only the UNet."""
        return nn.ModuleDict({"network": UNet2DModel.from_config(self.config)})

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights or, with a seed, fresh ones."""
        if random_weights is not None:
            return loading.randomly(self.build, random_weights)
        return nn.ModuleDict({"network": loading.load_model(self.folder, UNet2DModel)})

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the pixels themselves."""
        return images

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the UNet."""
        return parts["network"](x, times)

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """A module's map (B, C, h, w); a block returns it first in a tuple."""
        return first_tensor(output)


def _autoencoder(folder: Path) -> Path | None:
    """The index of the pipeline that a UNet's folder belongs to, if it has an autoencoder."""
    for root in (folder, folder.parent):
        index = root / "model_index.json"
        if index.is_file() and {"vae", "vqvae"} & loading.read_json(index).keys():
            return index
    return None


def _of_latents(index: Path) -> str:
    """What is wrong with a pipeline that has an autoencoder, and which teacher reads it."""
    parts = loading.read_json(index)
    entries = [parts[part] for part in ("unet", "transformer") if part in parts]
    network = str(entries[0][-1]) if entries and isinstance(entries[0], list) else "network"
    problem = (
        f"{index}: its {network} works on the latents of an autoencoder, but this teacher needs "
        "a UNet2DModel that works on pixels"
    )
    family = loading.FAMILIES.get(network, "diffusers_unet")
    if family == "diffusers_unet":
        return problem
    return f"{problem}; a recipe reads it with teacher.name={family}"


def _scheduler_folder(unet: Path) -> Path:
    """The folder of the scheduler's config, in or beside the UNet's folder."""
    for folder in (unet / "scheduler", unet, unet.parent / "scheduler", unet.parent):
        if (folder / "scheduler_config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"no scheduler_config.json in {unet} or beside it; save the scheduler that the UNet was "
        f"trained with: scheduler.save_pretrained({str(unet)!r})"
    )
