"""Monocular depth from frozen features: a linear layer over bins, and the scores of the field.

The linear head of DINOv2 (Oquab et al. 2023, section 7.4): 256 bins of equal width, their logits
normalised linearly as in AdaBins (Bhat et al. 2021), and the depth as the mean of the bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.benchmarks import Examples
from distill.data import as_float, in_order
from distill.errors import UserError
from distill.evaluation.backbones import Backbone
from distill.evaluation.linear import LinearProbe
from students.heads import resize_logits

BINS = 256
FLOOR = 0.1  # added to every weight, so that none is ever out of reach of the gradient
VARIANCE_FOCUS = 0.85


class Binned(nn.Module):
    """From the logits of bins to a depth.

    Args:
        nearest: Depth of the first bin.
        farthest: Depth of the last.
    """

    centres: Tensor

    def __init__(self, nearest: float, farthest: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(nearest, farthest, BINS))

    def forward(self, logits: Tensor) -> Tensor:
        """(B, BINS, h, w) -> (B, h, w)."""
        weights = logits.relu() + FLOOR
        return torch.einsum("bkhw,k->bhw", weights, self.centres) / weights.sum(dim=1)


def depth_probe(
    backbone: Backbone, rates: Sequence[float], depth_range: tuple[float, float], seed: int
) -> LinearProbe:
    """Linear heads, one per learning rate, that give depths (B, h, w) at the finest map's grid.

    The arguments are those of `LinearProbe`, and the nearest and the farthest depth.
    """
    probe = LinearProbe(backbone, rates, BINS, dense=True, seed=seed)
    probe.heads = nn.ModuleList(nn.Sequential(head, Binned(*depth_range)) for head in probe.heads)
    return probe


def at_resolution(depths: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear. depths: (B, h, w) -> (B, *size)."""
    return resize_logits(depths[:, None], size)[:, 0]


def scale_invariant_loss(guess: Tensor, truth: Tensor) -> Tensor:
    """The root of Eigen et al. 2014, equation 4, with the weight 0.85 of AdaBins.

    Args:
        guess: (B, h, w), above 0; resized to the truth.
        truth: (B, H, W), NaN where it is not known.

    Returns:
        (), over all known pixels of the batch; 0 where there is none.
    """
    guess = at_resolution(guess, (truth.shape[1], truth.shape[2]))
    known = ~truth.isnan()
    if not known.any():
        return guess.sum() * 0.0
    off = guess[known].log() - truth[known].log()
    squared = off.square().mean() - VARIANCE_FOCUS * off.mean().square()
    return (squared + 1e-6).sqrt()  # the root of 0 has no gradient


class DepthScores(NamedTuple):
    """Scores of one image, or means over images; all NaN if no pixel is known."""

    rmse: float
    """Root of the mean squared error, in the unit of depth."""
    abs_rel: float
    """Mean of the error over the true depth."""
    delta1: float
    """Share of pixels where the larger of guess and truth is below 1.25 times the other."""


def depth_scores(guess: Tensor, truth: Tensor) -> DepthScores:
    """guess, truth: (H, W), above 0, the latter NaN where nothing is to be scored."""
    known = ~truth.isnan()
    guess, truth = guess[known].double(), truth[known].double()
    guess = guess.where(~guess.isnan(), torch.inf)  # of a head that diverged: wrong, not unknown
    error, ratio = guess - truth, torch.maximum(guess / truth, truth / guess)
    return DepthScores(
        error.square().mean().sqrt().item(),
        (error.abs() / truth).mean().item(),
        (ratio < 1.25).double().mean().item(),
    )


def mean_scores(each: Sequence[DepthScores], name: str) -> DepthScores:
    """Means over the images with known depth; a UserError about data `name` if there is none."""
    known = [scores for scores in each if not math.isnan(scores.rmse)]
    if not known:
        raise UserError(f"{name}: the split has no pixels of known depth to score")
    return DepthScores(*torch.tensor(known, dtype=torch.float64).mean(0).tolist())


def measure(
    predict: Callable[[Tensor], Sequence[Tensor]],
    examples: Examples,
    *,
    device: torch.device | str,
    batch: int,
    workers: int = 0,
) -> list[list[DepthScores]]:
    """The scores of every image, for several predictors at once that share their features.

    Args:
        predict: Images (B, 3, H, W) in [0, 1] to each predictor's depths (B, h, w).
        examples: Images (3, H, W) uint8 of one size; depths of any, which guesses are resized to.
        device: Where images go.
        batch: Images per pass.
        workers: Processes that read them.

    Returns:
        One list per predictor.
    """
    found: list[list[DepthScores]] = []
    for items in in_order(examples, range(len(examples)), batch, workers):
        with torch.no_grad():
            guesses = predict(as_float(torch.stack([image for image, _ in items]).to(device)))
        found = found or [[] for _ in guesses]
        for scores, depths in zip(found, guesses, strict=True):
            for row, (_, target) in enumerate(items):
                truth = torch.as_tensor(target).to(device)
                guess = at_resolution(depths[row : row + 1], (truth.shape[0], truth.shape[1]))
                scores.append(depth_scores(guess[0], truth))
    return found
