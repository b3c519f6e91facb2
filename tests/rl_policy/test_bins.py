"""Timestep bins against spacings worked out by hand."""

import math
from typing import Any

import pytest
import torch

from rl_policy.bins import Spacing, timestep_bins

FALLING = [4.0, 3.9, 3.0, 2.0, 1.0, 0.5, 0.0, -4.0]


def test_linear_bins_hold_both_ends_and_equal_steps() -> None:
    log_snr = torch.linspace(5, -5, 1000)
    assert timestep_bins(log_snr, count=4, spacing="linear").tolist() == [0, 333, 666, 999]
    assert timestep_bins(log_snr, count=3, spacing="linear", lowest=10, highest=20).tolist() == [
        10,
        15,
        20,
    ]


def test_log_snr_bins_are_the_nearest_to_equal_steps_of_log_snr() -> None:
    # From 4 to -4 in three: 4, 0, -4
    assert timestep_bins(FALLING, count=3, spacing="log_snr").tolist() == [0, 6, 7]
    # Within 0..6, from 4 to 0 in five: 4, 3, 2, 1, 0
    chosen = timestep_bins(FALLING, count=5, spacing="log_snr", highest=6)
    assert chosen.tolist() == [0, 2, 3, 4, 6]
    assert chosen.dtype == torch.int64


def test_log_snr_bins_stay_distinct_where_the_curve_is_steep() -> None:
    # From 10 to 0 in four, 10, 6.7, 3.3, 0: nearest are 0, 3, 4, 4, and what is taken moves down
    late = [10.0, 9.9, 9.8, 9.7, 0.0]
    assert timestep_bins(late, count=4, spacing="log_snr").tolist() == [0, 2, 3, 4]
    # Nearest are 0, 0, 1, 4, and what is taken moves up
    early = [10.0, 0.3, 0.2, 0.1, 0.0]
    assert timestep_bins(early, count=4, spacing="log_snr").tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("spacing", ["linear", "log_snr"])
@pytest.mark.parametrize("count", [1, 2, 19, 20, 50, 1000])
def test_bins_of_a_ddpm_schedule_are_distinct_and_increasing(spacing: Spacing, count: int) -> None:
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    chosen = timestep_bins((alpha_bar / (1 - alpha_bar)).log(), count=count, spacing=spacing)
    assert chosen.shape == (count,)
    assert (chosen.diff() > 0).all()
    if count > 1:
        assert chosen[[0, -1]].tolist() == [0, 999]


def test_one_bin_lies_in_the_middle() -> None:
    assert timestep_bins(FALLING, count=1, spacing="linear", highest=6).tolist() == [3]
    assert timestep_bins(FALLING, count=1, spacing="log_snr").tolist() == [6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 9}, "choose 1 to 8"),
        ({"count": 0}, "choose 1 to 8"),
        ({"count": 3, "lowest": 4, "highest": 5}, "choose 1 to 2"),
        ({"count": 1, "lowest": 5, "highest": 4}, "from 5 to 4"),
        ({"count": 1, "highest": 8}, r"0\.\.7"),
        ({"count": 1, "lowest": -1}, r"0\.\.7"),
        ({"count": 2, "spacing": "cubic"}, "'cubic'.*linear, log_snr"),
    ],
)
def test_impossible_bins_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timestep_bins(FALLING, **{"spacing": "linear"} | arguments)


def test_log_snr_spacing_needs_a_finite_falling_curve() -> None:
    zero_terminal = [*FALLING, -math.inf]
    with pytest.raises(ValueError, match="finite and falls"):
        timestep_bins(zero_terminal, count=2, spacing="log_snr")
    assert timestep_bins(zero_terminal, count=2, spacing="log_snr", highest=7).tolist() == [0, 7]
    with pytest.raises(ValueError, match="finite and falls"):
        timestep_bins(FALLING[::-1], count=2, spacing="log_snr")
    with pytest.raises(ValueError, match="finite and falls"):
        timestep_bins([*FALLING, FALLING[-1]], count=2, spacing="log_snr")  # twice the same
