"""The cost of backbones: weights, operations, speed and memory, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distill.costs.memory import part_memory
from distill.evaluation.backbones import Backbone
from distill.training.clock import Timed, wait


class Footprint(NamedTuple):
    """The cost of a backbone's forward pass until its last map."""

    parameters: int | None
    """Number of weights of the whole network; None if unknown."""
    flops: int | None
    """Floating-point operations per image, two per multiply-add; None if unknown."""
    images_per_second: float
    """Images per second, the median over the rounds."""
    slowest: float
    """Images per second in the slowest round."""
    fastest: float
    """Images per second in the fastest round."""
    memory: float
    """MiB that tensors take at most during the pass of a batch, weights not counted; on a CPU with
    the copies of weights that the backend makes for it."""


def measure(
    backbones: Sequence[Backbone],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    batch: int,
    rounds: int,
) -> list[Footprint]:
    """Measure backbones in turn, in one process.

    Args:
        backbones: On the device.
        sizes: (H, W) of the images that each one sees.
        device: The device on which they are measured.
        batch: Images per pass.
        rounds: How often all take their turn, so that a disturbed moment strikes all alike.
    """
    inputs = [torch.rand(batch, 3, *size, device=device) for size in sizes]
    pairs = list(zip(backbones, inputs, strict=True))
    memories = [_peak_memory(backbone, images, device) for backbone, images in pairs]
    seconds: list[list[float]] = [[] for _ in pairs]
    for _ in range(rounds):
        for taken, (backbone, images) in zip(seconds, pairs, strict=True):
            wait(device)
            began = time.perf_counter()
            backbone.maps(images)
            wait(device)
            taken.append(time.perf_counter() - began)
    return [
        Footprint(
            backbone.parameters,
            backbone.flops(size),
            batch / statistics.median(taken),
            batch / max(taken),
            batch / min(taken),
            memory,
        )
        for backbone, size, taken, memory in zip(backbones, sizes, seconds, memories, strict=True)
    ]


def _peak_memory(backbone: Backbone, images: torch.Tensor, device: torch.device) -> float:
    """MiB above what was there before, in the second of two passes."""

    def again(part: Timed) -> None:
        with part("pass"):
            backbone.maps(images)

    backbone.maps(images)
    return part_memory(again, device)["pass"]
