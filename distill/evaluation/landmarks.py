"""Landmarks as heat maps: their targets and loss, how points move with an image, and the scores.

Points are x to the right and y down as shares of the image's width and height: its corners are at
(0, 0) and (1, 1), so that resizing an image leaves them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from distill.benchmarks import LandmarkBenchmark
from distill.errors import UserError

SIGMA = 1.5
"""Of the Gaussian in positions of the heat map, as HRNet trains WFLW (Sun et al. 2019)."""
FLOOR = 0.1
"""Share of a peak that its neighbours count with at least: of a Gaussian they have more."""
FAILURE = 0.1
"""The error from which a face counts as failed, and to which AUC is taken (Wu et al. 2018)."""
TURN = 30.0
SIZES = (0.75, 1.25)


def heat_maps(points: Tensor, size: tuple[int, int]) -> Tensor:
    """A Gaussian around each point. points: (B, K, 2) -> (B, K, *size) float32, at most 1."""
    height, width = size
    at = points * points.new_tensor([width, height]) - 0.5  # positions: the first centre is 0

    def bell(places: Tensor, length: int) -> Tensor:
        distance = torch.arange(length, device=points.device) - places[..., None]
        return distance.square().div(-2 * SIGMA**2).exp()

    return bell(at[..., 1], height)[..., :, None] * bell(at[..., 0], width)[..., None, :]


def peaks(maps: Tensor) -> Tensor:
    """Where heat maps are highest, between positions too. maps: (K, h, w) -> (K, 2) float32.

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
    """How far a head is from the points (B, K, 2): (B,) float32.

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


class RandomTurn:
    """An image and its points, turned by up to 30 degrees and made 0.75 to 1.25 times as large
    around the middle, as HRNet augments faces (Sun et al. 2019); borders are mirrored."""

    def __call__(self, image: tv_tensors.Image, *points: Tensor) -> Any:
        angle, scale = torch.rand(2).tolist()
        angle = math.radians(TURN * (2 * angle - 1))
        scale = SIZES[0] + (SIZES[1] - SIZES[0]) * scale
        height, width = image.shape[-2:]
        sine, cosine = math.sin(angle) / scale, math.cos(angle) / scale
        # From a place in the new image to that in the old one, from -1 to 1 in both.
        back = torch.tensor([[cosine, -sine * height / width], [sine * width / height, cosine]])
        theta = torch.cat([back, torch.zeros(2, 1)], dim=1)
        grid = F.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
        old = image.as_subclass(Tensor)[None].float()
        new = F.grid_sample(old, grid, padding_mode="reflection", align_corners=False)[0]
        turned = tv_tensors.Image(new.round().clamp(0, 255).to(torch.uint8))
        if not points:
            return turned
        return turned, ((2 * points[0] - 1) @ back.inverse().T + 1) / 2


class RandomMirror:
    """An image and its points, left to right in half of the cases.

    Args:
        mirrored: Which point each becomes.
    """

    def __init__(self, mirrored: Sequence[int]) -> None:
        self.mirrored = list(mirrored)

    def __call__(self, image: tv_tensors.Image, *points: Tensor) -> Any:
        if torch.rand(()) < 0.5:
            image = tv_tensors.Image(image.flip(-1))
            points = tuple(mirror(one, self.mirrored) for one in points)
        return (image, *points) if points else image


def mirror(points: Tensor, mirrored: Sequence[int]) -> Tensor:
    """The points (K, 2) of the mirror image, in their own order."""
    return torch.stack([1 - points[:, 0], points[:, 1]], dim=1)[list(mirrored)]


class LandmarkTally:
    """How far one predictor was off, on the faces counted so far.

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
            raise UserError(f"{self.benchmark.name}: the split has no face to score")
        names = ("nme", "failure_rate", "auc")
        return {name: value / faces for name, value in zip(names, sums, strict=True)}
