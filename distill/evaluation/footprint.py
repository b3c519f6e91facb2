"""The cost of backbones: weights, operations, speed and memory, measured side by side."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from distill.evaluation.backbones import Backbone
from distill.training.clock import Timed, wait

MARK = "distill part: "


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


def part_memory(program: Callable[[Timed], None], device: torch.device) -> dict[str, float]:
    """MiB that tensors hold at most while each part of a program runs, above those before it.

    What a part leaves behind, such as activations, counts in later ones too as long as it is held;
    a moment in a part inside another counts for the inner one alone.

    Args:
        program: Called once, with what it puts around its parts: `with part("teacher"): ...`.
        device: Whose memory: a GPU's by the count of its allocator, otherwise by a trace of all
            allocations, which slows the program down.
    """
    peaks = _on_gpu(program, device) if device.type == "cuda" else _on_cpu(program)
    return {part: peak / 2**20 for part, peak in peaks.items()}


def _borders(enter: Callable[[str], None]) -> Timed:
    """At every border of parts, `enter` gets the innermost one from there on; empty: none."""
    running = ""

    @contextmanager
    def inside(part: str) -> Iterator[None]:
        nonlocal running
        outer, running = running, part
        enter(part)
        try:
            yield
        finally:
            running = outer
            enter(outer)

    return inside


def _on_gpu(program: Callable[[Timed], None], device: torch.device) -> dict[str, int]:
    """Bytes by part: the allocator's peak, started anew at every border."""
    before, running = torch.cuda.memory_allocated(device), ""
    peaks: dict[str, int] = defaultdict(int)

    def enter(part: str) -> None:
        nonlocal running
        if running:
            peak = torch.cuda.max_memory_allocated(device) - before
            peaks[running] = max(peaks[running], peak)
        torch.cuda.reset_peak_memory_stats(device)
        running = part

    program(_borders(enter))
    return peaks


def _on_cpu(program: Callable[[Timed], None]) -> dict[str, int]:
    """Bytes by part: the profiler's trace of allocations, with a mark at every border.

    The resident size of a process tells nothing of the second network measured in it.
    """

    def enter(part: str) -> None:
        with record_function(MARK + part):
            pass

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler talks on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        program(_borders(enter))
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held, running = 0, ""
    peaks: dict[str, int] = defaultdict(int)
    for event in sorted(events, key=lambda event: float(event.get("ts", 0.0))):
        name = str(event.get("name"))
        if name == "[memory]":
            held += event["args"]["Bytes"]
        elif name.startswith(MARK):
            running = name.removeprefix(MARK)
        if running:
            peaks[running] = max(peaks[running], held)
    return peaks
