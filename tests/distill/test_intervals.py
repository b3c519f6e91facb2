"""Means over seeds and their intervals, by hand."""

import pytest

from distill.intervals import interval


def test_interval_is_students_t() -> None:
    # mean 0.2, deviation 0.1, t(0.975, 2) = 4.30265: 4.30265 * 0.1 / sqrt(3) = 0.24841
    mean, low, high = interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx((-0.04841, 0.44841), abs=1e-5)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_interval_is_written_in_points() -> None:
    assert str(interval([0.5, 0.5])) == "50.0 (50.0 to 50.0)"


def test_a_single_value_keeps_its_mean_and_has_no_interval() -> None:
    assert interval([0.31]) == (0.31, None, None)
    assert interval([0.31]).bounds is None
    assert str(interval([0.31])) == "31.0 (one seed)"
