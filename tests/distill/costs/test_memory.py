"""Memory by part of a program, on tensors of known size."""

from __future__ import annotations

import pytest
import torch

from distill.costs.memory import part_memory
from distill.training.clock import Timed

MIB = 2**20


def program(part: Timed) -> None:
    """Outer keeps 1 MiB, its inner part keeps 2 and takes 4, then outer takes 1 more."""
    before = torch.zeros(8 * MIB, dtype=torch.uint8)
    with part("outer"):
        kept = [torch.zeros(MIB, dtype=torch.uint8)]
        with part("inner"):
            kept.append(torch.zeros(2 * MIB, dtype=torch.uint8))
            torch.zeros(4 * MIB, dtype=torch.uint8)  # and freed at once
        torch.zeros(MIB, dtype=torch.uint8)
    del before, kept
    with part("late"):
        torch.zeros(3 * MIB, dtype=torch.uint8)


def test_a_part_holds_what_earlier_ones_left_and_its_own() -> None:
    held = part_memory(program, torch.device("cpu"))
    assert list(held) == ["outer", "inner", "late"]
    # 8 from before all parts.
    assert held == pytest.approx({"outer": 8 + 1 + 2 + 1, "inner": 8 + 1 + 2 + 4, "late": 3}, 0.01)


def test_of_several_rounds_the_largest_counts() -> None:
    def rounds(part: Timed) -> None:
        for size in (1, 5, 2):
            with part("round"):
                torch.zeros(size * MIB, dtype=torch.uint8)

    assert part_memory(rounds, torch.device("cpu")) == pytest.approx({"round": 5}, 0.01)


class Allocator:
    """Counts as a GPU's does: what is held, and the most since the last reset."""

    held = peak = 7 * MIB

    def change(self, bytes: int) -> None:
        self.held += bytes
        self.peak = max(self.peak, self.held)

    def reset(self) -> None:
        self.peak = self.held


def test_on_a_gpu_the_peak_starts_anew_at_every_border(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: gpu.reset())

    def program(part: Timed) -> None:
        with part("outer"):
            gpu.change(2 * MIB)
            with part("inner"):
                gpu.change(9 * MIB)
                gpu.change(-8 * MIB)
        gpu.change(100 * MIB)  # in no part
        gpu.change(-102 * MIB)
        with part("late"):
            gpu.change(MIB)

    assert part_memory(program, torch.device("cuda")) == {"outer": 3, "inner": 11, "late": 2}
