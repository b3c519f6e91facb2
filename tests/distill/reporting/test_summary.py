"""How a run is summed up in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.reporting.summary import _policy_figures, preferred


def test_the_three_likeliest_timesteps_are_named() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.04, 0.8, 0.1, 0.06]}
    assert preferred(late) == "t=50 (80%), t=100 (10%), t=150 (6%)"


def test_timesteps_that_are_never_chosen_are_not() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.002, 0.9, 0.098, 0.0]}
    assert preferred(late) == "t=50 (90%), t=100 (10%)"


def test_an_even_policy_prefers_none() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.26, 0.25, 0.25, 0.24]}
    assert preferred(late) == "none"


def test_figures_of_a_policy_are_means_over_the_last_tenth_of_its_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "probabilities": [1.0, 0.0], "policy/reward": float(step)}
        for step in range(20)
    ]
    rows[-1]["probabilities"] = [0.5, 0.5]
    config: Any = SimpleNamespace(policy=SimpleNamespace(name="a2c"))
    bins = {"timesteps": [0, 50], "noise_fraction": [0.0, 0.5]}
    found = _policy_figures(config, tmp_path, rows, bins)
    assert found is not None
    assert found["probabilities"] == pytest.approx([0.75, 0.25])
    assert found["mean_reward"] == pytest.approx((18 + 19) / 2)
    del rows[-1]["policy/reward"], rows[-2]["policy/reward"]
    found = _policy_figures(config, tmp_path, rows, bins)
    assert found is not None
    assert found["mean_reward"] is None
