"""How a run is summed up in words."""

from __future__ import annotations

from distill.reporting.summary import preferred


def test_the_three_likeliest_timesteps_are_named() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.04, 0.8, 0.1, 0.06]}
    assert preferred(late) == "t=50 (80%), t=100 (10%), t=150 (6%)"


def test_timesteps_that_are_never_chosen_are_not() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.002, 0.9, 0.098, 0.0]}
    assert preferred(late) == "t=50 (90%), t=100 (10%)"


def test_an_even_policy_prefers_none() -> None:
    late = {"timesteps": [0, 50, 100, 150], "probabilities": [0.26, 0.25, 0.25, 0.24]}
    assert preferred(late) == "none"
