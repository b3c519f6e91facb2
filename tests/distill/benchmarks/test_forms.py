"""Corners lie on outlines, are seen or covered, and objects have an order in depth."""

from __future__ import annotations

import numpy as np
import pytest

from distill.benchmarks.forms import CORNERS, FORMS, Placed, depth_order, visible


def placed(form: str, x: float, y: float, radius: float = 0.2, angle: float = 0.0) -> Placed:
    return Placed(form, np.array([x, y]), radius, angle)


@pytest.mark.parametrize("form", CORNERS)
def test_corners_lie_on_the_outline_and_stick_out(form: str) -> None:
    """At a corner the distance is 0; towards the centre it is inside, away from it outside."""
    assert np.abs(FORMS[form](*CORNERS[form].T)).max() < 1e-3
    assert (FORMS[form](*(0.97 * CORNERS[form].T)) < 0).all()
    assert (FORMS[form](*(1.03 * CORNERS[form].T)) > 0).all()


@pytest.mark.parametrize("form", CORNERS)
def test_corners_follow_their_object(form: str) -> None:
    tilted = placed(form, 0.4, 0.6, 0.25, 0.3)
    assert np.abs(tilted.distance(*tilted.corners().T)).max() < 1e-3
    assert np.abs(placed(form, 0.4, 0.6, 0.25).distance(*tilted.corners().T)).max() > 0.01


def test_corners_are_where_they_are_by_hand() -> None:
    square = placed("square", 0.5, 0.4, 0.25).corners()
    assert np.allclose(square, [[0.3, 0.2], [0.7, 0.2], [0.7, 0.6], [0.3, 0.6]])
    quarter = placed("square", 0.5, 0.4, 0.25, np.pi / 2).corners()
    assert np.allclose(quarter, square[[1, 2, 3, 0]])


def test_covered_corners_and_those_outside_are_not_seen() -> None:
    square = placed("square", 0.5, 0.5, 0.25)  # corners at 0.3 and 0.7
    disc = placed("disc", 0.3, 0.3, 0.1)
    assert visible([square, disc], 0).tolist() == [False, True, True, True]
    assert visible([disc, square], 1).all()
    outside = placed("square", 0.9, 0.5, 0.25)
    assert visible([outside], 0).tolist() == [True, False, False, True]


def test_what_covers_is_nearer() -> None:
    below, middle, above = (placed("disc", x, 0.5) for x in (0.3, 0.5, 0.7))
    apart = placed("disc", 0.9, 0.9, 0.05)
    assert depth_order([below, middle, above]) == [3.0, 2.0, 1.0]
    assert depth_order([above, below, middle]) == [2.0, 2.0, 1.0]  # two that do not meet
    assert depth_order([apart, below, middle]) == [1.0, 2.0, 1.0]
    assert depth_order([below]) == [1.0]
    large = placed("disc", 0.5, 0.5, 0.4)  # behind the farther of two that cover it
    assert depth_order([large, below, middle]) == [3.0, 2.0, 1.0]
