"""The target-noise floor: its estimate, its table, and what a run tells of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill.matching.losses import FeatureLoss
from distill.run_folder import read_metrics
from distill.training.floor import NoiseFloor, distinct


def draws(images: int, spread: float, seed: int) -> torch.Tensor:
    """Maps of one and the same signal 0 with noise of a known standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(images, 3, 8, 8, generator=generator)


def test_pairs_that_match_the_same_maps_have_names_of_their_own() -> None:
    assert distinct(["a-x", "b-x", "b-x"], ["mse"] * 3) == ["a-x", "b-x-mse-1", "b-x-mse-2"]
    assert distinct(["b-x", "b-x"], ["mse", "mine:power"]) == ["b-x-mse", "b-x-power"]
    assert distinct([], []) == []


def test_floor_is_the_variance_over_draws() -> None:
    loss = FeatureLoss("mse", 3, 3, standardise=False)
    student = torch.zeros(400, 3, 8, 8)
    floor = loss.noise_floor(student, draws(400, 0.5, 0), draws(400, 0.5, 1))
    assert floor.shape == (400,)
    assert floor.mean().item() == pytest.approx(0.25, rel=0.02)
    # which is what the best student, the mean over draws (here 0), is left with
    best = loss(student, draws(400, 0.5, 2), torch.zeros(400, dtype=torch.int64))
    assert floor.mean().item() == pytest.approx(best.mean().item(), rel=0.02)


def test_floor_is_in_units_of_the_standardised_target() -> None:
    loss, student = FeatureLoss("mse", 3, 3), torch.zeros(200, 3, 8, 8)
    loss(student, draws(200, 4.0, 0), torch.zeros(200, dtype=torch.int64))
    floor = loss.noise_floor(student, draws(200, 4.0, 1), draws(200, 4.0, 2))
    assert floor.mean().item() == pytest.approx(1.0, rel=0.03)  # nothing but noise


def test_floor_is_taken_at_the_grid_of_the_loss() -> None:
    """Averaging 4x4 positions leaves a sixteenth of the variance of independent noise."""
    loss = FeatureLoss("mse", 3, 3, standardise=False)
    floor = loss.noise_floor(torch.zeros(300, 3, 2, 2), draws(300, 1.0, 0), draws(300, 1.0, 1))
    assert floor.mean().item() == pytest.approx(1 / 16, rel=0.05)


def test_table_keeps_the_means_of_each_bin() -> None:
    floor = NoiseFloor(["a", "b"], 3)
    assert floor.means() == {}
    floor.add(torch.tensor([[0.2, 1.0], [0.4, 3.0]]), torch.tensor([2, 2]))
    floor.add(torch.tensor([[0.6, 5.0]]), torch.tensor([0]))
    assert floor.by_bin() == {
        "a": pytest.approx([0.6, None, 0.3]),
        "b": pytest.approx([5.0, None, 2.0]),
    }
    assert floor.means() == pytest.approx({"a": 0.4, "b": 3.0})


def test_a_run_reports_its_floor(finished_run: Path) -> None:
    floor = json.loads((finished_run / "summary.json").read_text())["noise_floor"]
    (pair,) = floor["mean"]
    assert pair == "layer3-up_blocks.0"
    assert 0 < floor["mean"][pair] < 2
    assert len(floor["bins"][pair]) == 4
    rows = [row for row in read_metrics(finished_run) if row["arm"] == "distilled"]
    assert rows[-1][f"floor/{pair}"] == pytest.approx(floor["mean"][pair])
