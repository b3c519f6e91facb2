"""Quality of a trained teacher, for its card: loss by noise level, and a linear probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from distill.augmentation import Strength, augmentation
from distill.benchmarks import Benchmark, Examples, notice
from distill.build import Unlabelled
from distill.config import DataConfig
from distill.data import Augmented, Draw, Resized, choose_labelled
from distill.errors import UserError
from distill.probing.linear_probe import linear_probe
from distill.tasks import traits
from teachers.ddpm import loss_by_timestep
from teachers.diffusers_unet import PixelUNet, diffusers_unet

LOSS_IMAGES = 64
BATCH = 32
SEED = 0  # of images, patches and noise; not the run's, so that the cards of two runs compare


class TimestepLosses(NamedTuple):
    """Mean denoising loss in equal parts of the schedule, from little noise to much."""

    split: str
    images: int
    values: Sequence[float]


class TeacherProbe(NamedTuple):
    """Scores in [0, 1] of a linear probe on this teacher, and on one with random weights."""

    metric: str
    layer: str
    timestep: int
    train: int
    val: int
    trained: float
    random: float


def held_out(benchmark: Benchmark) -> tuple[str, Examples]:
    """The val split, or the training images where a benchmark has none; with its name."""
    try:
        examples = benchmark.dataset("val")
        if len(examples):
            return "val", examples
    except (UserError, OSError) as error:
        if benchmark.task is not None:  # a folder of images has none
            notice(f"the card's losses are of training images, as val was not read: {error}")
    return "train", benchmark.dataset("train")


def judge_losses(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    benchmark: Benchmark,
    data: DataConfig,
    size: tuple[int, int],
) -> TimestepLosses:
    """The loss of a network at each noise level, on val images if there are any.

    Args:
        unet: On any device.
        scheduler: That it was trained with.
        benchmark: The data set that the network was trained on.
        data: How they were shown in training.
        size: (H, W) that it was trained at.
    """
    split, examples = held_out(benchmark)
    unet = unet.eval()
    batches = _batches(examples, LOSS_IMAGES, benchmark, data, size)
    values = loss_by_timestep(
        unet,
        scheduler,
        (images.to(unet.device) for images, _ in batches),
        torch.Generator().manual_seed(SEED),
    )
    return TimestepLosses(split, min(LOSS_IMAGES, len(examples)), values)


def judge_features(
    pipeline: Path,
    benchmark: Benchmark,
    data: DataConfig,
    size: tuple[int, int],
    *,
    count: int,
    device: torch.device,
) -> TeacherProbe | str:
    """A linear probe on the middle up block at 2% of the schedule, or the reason for having none.

    Args:
        pipeline: The teacher's folder.
        benchmark: Whose images and labels.
        data: How images were shown in training.
        size: (H, W) that the teacher was trained at.
        count: Labelled images to fit on, and to score on, at most.
        device: Where features are computed.
    """
    if benchmark.task is None or count == 0:
        return "the data have no labels" if count else "none was asked for"
    if not traits(benchmark).classes:
        return f"the data have {traits(benchmark).labels}, but it needs classes"
    split, val = held_out(benchmark)
    if split != "val":
        return "there is no val split to score it on"
    train = benchmark.dataset("train")
    levels = len(PixelUNet(str(pipeline)).config["block_out_channels"])
    layer = f"up_blocks.{(levels - 1) // 2}"
    scores, timestep = [], 0
    for random_weights in (None, SEED):
        teacher = diffusers_unet(str(pipeline), layers=[layer], random_weights=random_weights)
        timestep = round(0.02 * len(teacher.noise_schedule))
        score = linear_probe(
            teacher.to(device),
            _batches(train, count, benchmark, data, size),
            _batches(val, count, benchmark, data, size),
            timestep=timestep,
            classes=benchmark.num_classes,
            dense=benchmark.task == "segmentation",
            ignore_index=benchmark.ignore_index,
            device=device,
            seed=SEED,
        )
        scores.append(score)
    metric = "mIoU" if benchmark.task == "segmentation" else "top-1"
    counts = (min(count, len(train)), min(count, len(val)))
    return TeacherProbe(metric, layer, timestep, *counts, *scores)


def _batches(
    examples: Examples,
    count: int,
    benchmark: Benchmark,
    data: DataConfig,
    size: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Examples in the size of training, with a fixed view of each."""
    if benchmark.task == "landmarks":
        examples = Unlabelled(examples)  # points do not follow patches, and nobody asks for them
    patches = data.augment == "patch"
    sized = examples if patches else Resized(examples, size, masks=True)
    strength: Strength = "patch" if patches else "none"
    change = augmentation(
        strength,
        benchmark.task,
        size,
        patch_scale=data.patch_scale,
        mirrored=getattr(benchmark, "mirrored", ()),
    )
    views = Augmented(sized, change)
    targets = getattr(examples, "targets", None)
    chosen = choose_labelled(len(examples), min(count, len(examples)), SEED, targets)
    for start in range(0, len(chosen), BATCH):
        items = [views[Draw(index, index)] for index in chosen[start : start + BATCH]]
        yield (
            torch.stack([image for image, _ in items]),
            torch.stack([torch.as_tensor(target) for _, target in items]),
        )
