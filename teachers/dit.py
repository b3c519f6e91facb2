"""diffusers' `DiTTransformer2DModel`: transformers on the patches of a VAE's latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from teachers import latents, loading
from teachers.diffusion import DiffusionTeacher, View
from teachers.tap import first_tensor


def dit(
    path: str, *, revision: str | None = None, class_labels: bool = False, **view: Unpack[View]
) -> DiffusionTeacher:
    """A class-conditional diffusion transformer such as facebook/DiT-XL-2-256 (Peebles & Xie 2023).

    Images may have any size that the VAE and the patches divide, not only squares: diffusers
    stretches the position embedding over the grid. The network was trained on squares of one size
    (256 pixels in that model, given as `sample_size` latents); `image_size` resizes to it.

    A few of its channels are thousands of times larger than the others (massive activations, Sun
    et al. 2024). A feature loss should standardise the channels, as is its default, or it sees
    little else.

    Args:
        path: a pipeline folder (`transformer/`, `vae/` and `scheduler/`), or a hub id.
        revision: branch, tag or commit, for a hub id.
        class_labels: condition on the labels passed to `features`; they must be the network's own
            classes, such as ImageNet's. Without this, and for an image without a label, it gets the
            null class of classifier-free guidance (Ho & Salimans 2022).
        view: see `teachers.diffusion.View`; layers are `transformer_blocks.14`, ...

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `DiT`.
    """
    return DiffusionTeacher(DiT(path, revision, class_labels), **view)


class DiT:
    """The family of `dit`, with its arguments (a `diffusion.Family`).

    Raises:
        OSError: a folder or file is missing, or the hub does not have it.
        ValueError: other models in the folder, models that do not fit together, or an
            unsupported schedule.
    """

    def __init__(self, path: str, revision: str | None = None, class_labels: bool = False) -> None:
        self.root = loading.pipeline_folder(path, revision, ("transformer", "vae"))
        self.name = Path(path).name
        self.config = loading.read_config(
            self.root / "transformer", DiTTransformer2DModel, ("Transformer2DModel",)
        )
        self.vae_config = latents.read_config(self.root)
        if self.vae_config["latent_channels"] != self.config["in_channels"]:
            raise ValueError(
                f"{self.root}: the VAE's latents have {self.vae_config['latent_channels']} "
                f"channels, but the transformer needs {self.config['in_channels']}; "
                "both must be from the same pipeline"
            )
        self.noise_schedule = loading.load_schedule(self.root / "scheduler")
        self.configs: Mapping[str, Any] = {
            "transformer": self.config,
            "vae": self.vae_config,
            "scheduler": loading.without_bookkeeping(
                self.root / "scheduler" / "scheduler_config.json"
            ),
        }
        self.null_class: int = self.config["num_embeds_ada_norm"]
        self.classes = self.null_class if class_labels else 0
        self.patch: int = self.config["patch_size"]
        reduction = latents.reduction(self.vae_config)
        self.multiple = reduction * self.patch
        self.coarsest = self.multiple
        self.image_size = self.config["sample_size"] * reduction

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: the transformer and the VAE."""
        return _parts(self._fresh(), AutoencoderKL.from_config(self.vae_config))

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights; with a seed, the transformer's are fresh."""
        if random_weights is None:
            network = loading.load_model(self.root / "transformer", DiTTransformer2DModel)
        else:
            network = loading.randomly(self._fresh, random_weights)
        return _parts(network, loading.load_model(self.root / "vae", AutoencoderKL))

    def _fresh(self) -> nn.Module:
        network: nn.Module = DiTTransformer2DModel.from_config(self.config)
        return network

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the VAE's latents."""
        return latents.encode(parts["vae"], images)

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the transformer; for an image that is not square, stop before its prediction."""
        classes = torch.full((len(x),), self.null_class, device=x.device)  # (B,)
        if labels is not None:
            classes = torch.where(labels < 0, classes, labels)
        try:
            return parts["network"](x, timestep=times, class_labels=classes)
        except _Oblong:
            return None

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """Tokens (B, N, C), N in rows of patches, as (B, C, h, w)."""
        output = first_tensor(output)
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] == height * width:
            return output.transpose(1, 2).reshape(len(output), -1, height, width)
        return output


def _parts(network: nn.Module, vae: nn.Module) -> nn.ModuleDict:
    network.get_submodule("proj_out_2").register_forward_hook(_end_if_oblong)
    return nn.ModuleDict({"network": network, "vae": vae})


class _Oblong(Exception):
    """Ends a forward pass before a prediction that is not needed and cannot be assembled."""


def _end_if_oblong(module: nn.Module, args: Any, patches: Tensor) -> None:
    """Raise `_Oblong` unless the patches (B, N, C) make a square, as diffusers assumes."""
    if math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise _Oblong
