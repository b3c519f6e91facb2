"""`distill bench`: a distillation step beside the naive one, in turn, in one process."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import checkpoint
from distill.build import build_accelerator, build_training_set
from distill.config import (
    DataConfig,
    PairConfig,
    PolicyConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from distill.errors import UserError
from distill.tracking import commit, hardware
from distill.trainer import Trainer
from rl_policy.protocol import TimestepPolicy
from rl_policy.reward import TeacherTaskReward
from teachers.diffusion import DiffusionTeacher

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
            lambda module, inputs, output: maps.update({layer: output})
        )
        self.teacher.network(x, timesteps.to(x.device))
        handle.remove()
        return maps


class TimedPolicy:
    """A policy whose time in `act` and `learn` is added up."""

    def __init__(self, policy: TimestepPolicy) -> None:
        self.policy, self.seconds = policy, 0.0

    def act(self, *arguments: Any) -> Tensor:
        """See `TimestepPolicy.act`."""
        began = time.perf_counter()
        bins = self.policy.act(*arguments)
        self.seconds += time.perf_counter() - began
        return bins

    def learn(self, *arguments: Any) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        began = time.perf_counter()
        metrics = self.policy.learn(*arguments)
        self.seconds += time.perf_counter() - began
        return metrics


class Round(NamedTuple):
    """Seconds of one step each, and of what `rl_policy` took of ours."""

    ours: float
    naive: float
    policy: float


def bench(*, batch: int, rounds: int, layer: str, out: str | None) -> str:
    """Time our step against the naive one at 32 px, with the CIFAR-10 DDPM and a resnet18.

    Ours: bfloat16, channels_last, the UNet left after the layer. Naive: float32, the complete UNet.
    Student, losses, policy and images are the same; the teacher's weights are random.

    Args:
        batch: Images a step.
        rounds: How often the two take their turn, after one round to warm up.
        layer: The teacher's layer.
        out: A JSON file for the figures.

    Returns:
        The table to print.
    """
    if batch < 2 or rounds < 1:
        raise UserError(f"bench: two images and one round at least, not {batch} and {rounds}")
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(Path(scratch), batch, layer)
        ours, naive = _trainer(config), _trainer(_naive(config))
    assert isinstance(naive.teacher, DiffusionTeacher)
    used, whole = naive.teacher.flops(32)
    naive.teacher = WholeTeacher(naive.teacher)  # type: ignore[assignment]
    assert ours.policy is not None
    policy = TimedPolicy(ours.policy)
    ours.policy = policy  # type: ignore[assignment]
    device = ours.accelerator.device
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    masks = torch.zeros(batch, 32, 32, dtype=torch.int64, device=device)
    timed = [_round(ours, naive, policy, images, masks) for _ in range(rounds + 1)][1:]
    ratios = [r.naive / r.ours for r in timed]
    ratio = statistics.median(ratios)
    share = statistics.median(r.policy / r.ours for r in timed)
    figures = {
        "batch": batch,
        "layer": layer,
        "images_per_second": batch / statistics.median(r.ours for r in timed),
        "naive_images_per_second": batch / statistics.median(r.naive for r in timed),
        "ratio": ratio,
        "ratios": ratios,
        "policy_share": share,
        "teacher_gflop": used / 1e9,
        "naive_teacher_gflop": whole / 1e9,
        "hardware": hardware(device),
        "commit": commit(),
    }
    if out is not None:
        checkpoint.write_text(out, json.dumps(figures, indent=2) + "\n")
    spread = f"median of {rounds} rounds, {min(ratios):.1f} to {max(ratios):.1f}"
    return (
        f"one step, {batch} images of 32 px, {layer} of the CIFAR-10 DDPM, resnet18, "
        f"{figures['hardware']}\n"
        f"  naive  {figures['naive_images_per_second']:7.1f} images/s  (float32, complete UNet, "
        f"{whole / 1e9:.1f} GFLOP an image)\n"
        f"  ours   {figures['images_per_second']:7.1f} images/s  (bfloat16, UNet left after the "
        f"layer, {used / 1e9:.1f} GFLOP an image)\n"
        f"  ratio  {ratio:7.1f}  ({spread})\n"
        f"  policy {share:7.1%}  of our step (choosing, learning, reward head)"
    )


def _config(folder: Path, batch: int, layer: str) -> RunConfig:
    for name, content in (("unet/config", CIFAR10_DDPM), ("scheduler/scheduler_config", SCHEDULE)):
        path = folder / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    return RunConfig(
        data=DataConfig(options={"size": 32, "train": 1}),
        teacher=TeacherConfig(path=str(folder), random_weights=0),
        student=StudentConfig(model="resnet18"),
        pairs=[PairConfig(student=["layer2"], teacher=layer)],
        policy=PolicyConfig(),
        train=TrainConfig(batch=batch, unlabelled_batch=0, floor_every=0),
    )


def _naive(config: RunConfig) -> RunConfig:
    train = dataclasses.replace(config.train, precision="no", channels_last=False)
    teacher = dataclasses.replace(config.teacher, dtype="float32")
    return dataclasses.replace(config, train=train, teacher=teacher)


def _trainer(config: RunConfig) -> Trainer:
    accelerator = build_accelerator(config.device)
    return Trainer(config, "distilled", build_training_set(config.data), accelerator)


def _round(
    ours: Trainer, naive: Trainer, policy: TimedPolicy, images: Tensor, masks: Tensor
) -> Round:
    before = policy.seconds
    seconds = _seconds(lambda: ours.train_step(images, masks, None), images.device)
    chosen = policy.seconds - before
    head = ours.distiller.reward_head
    assert head is not None
    reward = _reward_seconds(head, len(images), images.device)
    slow = _seconds(lambda: naive.train_step(images, masks, None), images.device)
    return Round(seconds, slow, chosen + reward)


def _reward_seconds(head: TeacherTaskReward, batch: int, device: torch.device) -> float:
    """Forward and backward of the reward head alone, on a map of the mid block's size."""
    feature = torch.rand(batch, len(head.standardise.mean), 4, 4, device=device)
    bins = torch.zeros(batch, dtype=torch.int64, device=device)
    seconds = _seconds(lambda: head(feature, bins).sum().backward(), device)
    head.zero_grad()
    return seconds


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
