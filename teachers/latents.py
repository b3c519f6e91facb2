"""The latent space of latent diffusion: a pipeline's `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from teachers import loading


def read_config(pipeline: Path) -> dict[str, Any]:
    """The config of the autoencoder in `pipeline/vae`.

    Raises:
        OSError, ValueError: missing, not an `AutoencoderKL`, or not for RGB images.
    """
    config = loading.read_config(pipeline / "vae", AutoencoderKL)
    where = pipeline / "vae" / "config.json"
    if config["in_channels"] != 3:
        raise ValueError(
            f"{where}: the autoencoder has {config['in_channels']} input channels; a teacher needs "
            "3 (RGB)"
        )
    if not isinstance(config["scaling_factor"], int | float):
        raise ValueError(
            f"{where}: scaling_factor must be a number, got {config['scaling_factor']!r}"
        )
    for key in ("latents_mean", "latents_std"):
        if config[key] and len(config[key]) != config["latent_channels"]:
            raise ValueError(
                f"{where}: {key} has {len(config[key])} numbers, but the latents have "
                f"{config['latent_channels']} channels"
            )
    return config


def reduction(config: Mapping[str, Any]) -> int:
    """Side of the image over the side of its latents: each level but one halves."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """The posterior's mean, shifted and scaled as the autoencoder's config says.

    The mean rather than a draw, so that the timestep's noise is the only noise.

    Args:
        vae: an `AutoencoderKL`. A float16 one becomes float32 at its first image unless its
            config turns `force_upcast` off, as activations (of SDXL's, say) overflow float16.
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        (B, c, h, w) float32, contiguous: some convolutions return channels_last, which would
        change how the network rounds.
    """
    assert isinstance(vae, AutoencoderKL)
    if vae.dtype == torch.float16 and vae.config["force_upcast"]:
        with torch.inference_mode(False):  # its weights outlive the caller's inference mode
            vae.float()
    mean = vae.encode(images.to(vae.dtype)).latent_dist.mean.float()
    shift, scale = vae.config["shift_factor"] or 0.0, vae.config["scaling_factor"]
    each = vae.config["latents_mean"], vae.config["latents_std"]
    if all(each):  # of every channel, where an autoencoder of SDXL's layout was given them
        shift, spread = (torch.tensor(x, device=mean.device)[:, None, None] for x in each)
        scale = scale / spread
    latents: Tensor = (mean - shift) * scale
    return latents.contiguous()
