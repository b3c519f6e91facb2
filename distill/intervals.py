"""Confidence intervals of means over seeds or pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """A mean with its 95% confidence interval (Student's t), which a single value does not have."""

    mean: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Low and high."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        if self.bounds is None:
            return f"{100 * self.mean:.1f} (one seed)"
        low, high = self.bounds
        return f"{100 * self.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of one value or more, such as paired differences, and how sure it is."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None)
    margin = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
    return Interval(mean, mean - margin, mean + margin)
