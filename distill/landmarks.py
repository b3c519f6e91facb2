"""Landmarks as heat maps: their targets and loss, where they are highest, and the scores.

Points are x to the right and y down as shares of the image's width and height: its corners are at
(0, 0) and (1, 1), so that resizing an image leaves them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.benchmarks import LandmarkBenchmark
from distill.errors import UserError

SIGMA = 1.5
"""Sigma of the Gaussian, in heat map positions, as HRNet trains WFLW (Sun et al. 2019)."""
FLOOR = 0.1
"""Least height of a peak's neighbours as a share of it; those of a Gaussian are higher."""
FAILURE = 0.1
"""The error above which a face counts as failed, and up to which AUC is taken (Wu et al. 2018)."""


def heat_maps(points: Tensor, size: tuple[int, int]) -> Tensor:
    """A Gaussian around each point. points: (B, K, 2) -> (B, K, *size) float32, at most 1."""
    height, width = size
    at = points * points.new_tensor([width, height]) - 0.5  # positions: the first centre is 0

    def bell(places: Tensor, length: int) -> Tensor:
        distance = torch.arange(length, device=points.device) - places[..., None]
        return distance.square().div(-2 * SIGMA**2).exp()

    return bell(at[..., 1], height)[..., :, None] * bell(at[..., 0], width)[..., None, :]


def peaks(maps: Tensor) -> Tensor:
    """Peaks of heat maps, also between positions. maps: (K, h, w) -> (K, 2) float32.

    The highest position, moved to the top of the parabola through its logarithm and those of its
    two neighbours, in each direction, which is exact for a Gaussian (DARK, Zhang et al. 2020,
    without its smoothing). At a border it stays at the position's centre.
    """
    count, height, width = maps.shape
    best = maps.flatten(1).argmax(1)
    row, column = best // width, best % width
    index = torch.arange(count, device=maps.device)
    along_x = _between(maps[index, row], column)
    along_y = _between(maps[index, :, column], row)
    return torch.stack([along_x / width, along_y / height], dim=1)


def _between(lines: Tensor, best: Tensor) -> Tensor:
    """The top of each line in positions from its edge. lines: (K, L), best: (K,) -> (K,)."""
    last = lines.shape[1] - 1
    inside = (best > 0) & (best < last)
    places = [(best + step).clamp(0, last) for step in (-1, 0, 1)]
    near = torch.stack([lines.gather(1, place[:, None])[:, 0] for place in places]).float()
    before, top, after = torch.maximum(near, FLOOR * near[1]).clamp(min=1e-6).log()
    bend = (2 * top - before - after).clamp(min=1e-6)
    shift = torch.where(inside, (after - before) / (2 * bend), 0.0)
    return best + 0.5 + shift


def landmark_loss(outputs: Tensor, points: Tensor) -> Tensor:
    """Loss of a head's outputs for the points (B, K, 2): (B,) float32.

    Args:
        outputs: Heat maps (B, K, h, w): their squared error over that of empty ones, so that 1 is
            what predicting nothing costs. Or coordinates (B, 2 K), -1 and 1 at the image's edges:
            the mean distance to the points, as a share of the image's side.
    """
    if outputs.ndim == 4:
        height, width = outputs.shape[-2:]
        wrong = (outputs.float() - heat_maps(points, (height, width))).square().sum(dim=(2, 3))
        return wrong.mean(dim=1) / (math.pi * SIGMA**2)
    found = (1 + outputs.float().view_as(points)) / 2
    distances: Tensor = (found - points).norm(dim=2)
    return distances.mean(dim=1)


class LandmarkTally:
    """Errors of one predictor on the faces counted so far.

    Args:
        benchmark: Says between which points the unit lies.
        device: Where predictions are.

    Attributes:
        each: The error (NME) of each face, in order: the mean distance of its points from the true
            ones over that of its outer eye corners.
    """

    def __init__(self, benchmark: LandmarkBenchmark, device: torch.device | str) -> None:
        self.benchmark, self.device = benchmark, device
        self.each: list[Tensor] = []

    def update(self, logits: Tensor, guess: Tensor, truth: Tensor) -> None:
        """Count one face. logits: (K, h, w), not looked at; guess, truth: (K, 2)."""
        left, right = self.benchmark.eyes
        unit = (truth[left] - truth[right]).norm()
        self.each.append((guess - truth).norm(dim=1).mean() / unit)

    def scores(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any]:
        """Shares over all that was counted, as the authors of WFLW define them (Wu et al. 2018).

        Args:
            total: Sums a tensor over the processes.

        Returns:
            `nme`, the mean error; `failure_rate`, the share of faces whose error is above 0.1;
            `auc`, the area under the share of faces by error, up to 0.1, over that of a perfect
            predictor.

        Raises:
            UserError: There was no face.
        """
        errors = torch.stack([*self.each, torch.zeros((), device=self.device)])[:-1]
        failed, area = errors > FAILURE, (1 - errors / FAILURE).clamp(min=0)
        sums = [errors.sum(), failed.float().sum(), area.sum(), errors.new_tensor(len(errors))]
        *sums, faces = total(torch.stack(sums)).tolist()
        if not faces:
            raise UserError(f"{self.benchmark.name}: the split has no faces to score")
        names = ("nme", "failure_rate", "auc")
        return {name: value / faces for name, value in zip(names, sums, strict=True)}
