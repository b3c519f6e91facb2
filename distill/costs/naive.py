"""The baseline of `distill bench`: a published network, and the naive way to its features."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from teachers.diffusion import DiffusionTeacher
from teachers.tap import first_tensor

# The published configuration of google/ddpm-cifar10-32 (Ho et al. 2020, 35.7M parameters).
CIFAR10_DDPM = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,  # one head
}
SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


class WholeTeacher:
    """The naive way to a feature map: a hook, and the complete forward pass for its sake."""

    def __init__(self, teacher: DiffusionTeacher) -> None:
        self.teacher = teacher

    @torch.no_grad()
    def features(
        self, images: Tensor, timesteps: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As `DiffusionTeacher.features` gives them."""
        maps: dict[str, Tensor] = {}
        layer = self.teacher.layers[0]
        noise = torch.randn(images.shape, generator=generator, device=generator.device)
        x = self.teacher.noise_schedule.add_noise(
            2 * images - 1, noise.to(images.device), timesteps
        )
        handle = self.teacher.network.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output: maps.update({layer: first_tensor(output)})
        )
        self.teacher.network(x, timesteps.to(x.device))
        handle.remove()
        return maps


def write_cifar10_ddpm(folder: Path) -> None:
    """Make a pipeline folder of that network, without weights."""
    for name, content in (("unet/config", CIFAR10_DDPM), ("scheduler/scheduler_config", SCHEDULE)):
        path = folder / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
