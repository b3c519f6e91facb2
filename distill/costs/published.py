"""What `distill bench` times without a recipe: a published network at CIFAR-10's size."""

from __future__ import annotations

import json
from pathlib import Path

from distill.config import (
    DataConfig,
    PairConfig,
    PolicyConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

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


def published_case(
    folder: Path, batch: int, layer: str, teacher: str | None, compile: bool
) -> RunConfig:
    """The recipe: a resnet18 and a UNet at 32 px.

    Args:
        folder: For the network's configs.
        batch: Images per step, all labelled.
        layer: The teacher's layer.
        teacher: A path as in a recipe; None: `CIFAR10_DDPM` with random weights.
        compile: Teacher and student compiled.
    """
    network = folder / "ddpm-cifar10-32"
    _write_cifar10_ddpm(network)
    return RunConfig(
        data=DataConfig(options={"size": 32, "train": batch}, augment="none"),
        teacher=TeacherConfig(
            path=teacher or str(network),
            random_weights=None if teacher else 0,
            compile=compile,
        ),
        student=StudentConfig(model="resnet18", compile=compile),
        pairs=[PairConfig(student=["layer2"], teacher=layer)],
        policy=PolicyConfig(bins=10),
        train=TrainConfig(batch=batch, unlabelled_batch=0),
    )


def _write_cifar10_ddpm(folder: Path) -> None:
    """Make a pipeline folder of that network, without weights."""
    for name, content in (("unet/config", CIFAR10_DDPM), ("scheduler/scheduler_config", SCHEDULE)):
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
