"""The timesteps that a policy chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["linear", "log_snr"]


def timestep_bins(
    log_snr: Sequence[float] | Tensor,
    *,
    count: int,
    spacing: Spacing,
    lowest: int = 0,
    highest: int | None = None,
) -> Tensor:
    """Spread K distinct timesteps over a teacher's noise schedule, both ends included.

    Args:
        log_snr: log(alpha_bar / (1 - alpha_bar)) at each of the T timesteps, falling with t.
        count: K. A single bin lies in the middle.
        spacing: equal steps of the index ("linear") or of the log signal-to-noise ratio
            ("log_snr"), rounded to the nearest free timestep.
        lowest: smallest timestep allowed.
        highest: largest timestep allowed, T-1 if None.

    Returns:
        (K,) int64, increasing, within [lowest, highest].

    Raises:
        ValueError: a range outside 0..T-1, more bins than timesteps, an unknown spacing, or for
            "log_snr" a log-SNR that is not finite and falling within the range.
    """
    curve = torch.as_tensor(log_snr, dtype=torch.float64).cpu()
    last = len(curve) - 1
    highest = last if highest is None else highest
    if not 0 <= lowest <= highest <= last:
        raise ValueError(
            f"timesteps from {lowest} to {highest} are not a range within the teacher's "
            f"schedule, 0..{last}"
        )
    available = highest - lowest + 1
    if not 1 <= count <= available:
        raise ValueError(
            f"{count} timestep bins do not fit: choose 1 to {available}, the number of "
            f"timesteps from {lowest} to {highest}"
        )
    fractions = torch.arange(count, dtype=torch.float64) / (count - 1) if count > 1 else [0.5]
    fractions = torch.as_tensor(fractions, dtype=torch.float64)
    if spacing == "linear":
        return (lowest + fractions * (available - 1) + 0.5).floor().long()
    if spacing == "log_snr":
        return lowest + _nearest_distinct(curve[lowest : highest + 1], fractions)
    raise ValueError(f"unknown spacing {spacing!r}; choose from linear, log_snr")


def _nearest_distinct(curve: Tensor, fractions: Tensor) -> Tensor:
    """Distinct indices of a falling curve (N,) nearest to the fractions (K,) of its fall."""
    if not bool(torch.isfinite(curve).all()) or bool((curve.diff() >= 0).any()):
        raise ValueError(
            "log-SNR spacing needs a log-SNR that is finite and falls with the timestep; narrow "
            "the range of timesteps, or use linear spacing"
        )
    targets = curve[0] + fractions * (curve[-1] - curve[0])
    nearest = (targets[:, None] - curve).abs().argmin(dim=1).tolist()
    chosen: list[int] = []
    for position, index in enumerate(nearest):
        after_previous = chosen[-1] + 1 if chosen else 0
        room_for_the_rest = len(curve) - (len(nearest) - position)
        chosen.append(min(max(index, after_previous), room_for_the_rest))
    return torch.tensor(chosen)
