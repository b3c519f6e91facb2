"""The memory of a program by its parts."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from distill.training.clock import Timed

MARK = "distill part: "


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
