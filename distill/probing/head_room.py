"""What choosing the timestep of every image could bring, and how much of that is chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
FOLDS = 5


class Estimate(NamedTuple):
    """A mean over images with its 95% interval (percentiles of a bootstrap over images)."""

    mean: float
    low: float
    high: float


def written(estimates: Iterable[Estimate]) -> list[str]:
    """As `mean (low to high)`, in columns, with the decimals that the narrowest interval needs.

    Three, or more where a width would vanish in rounding; equal ends need none.
    """
    rows = list(estimates)
    widths = [row.high - row.low for row in rows if row.high - row.low > 1e-6]
    digits = max(3, math.ceil(-math.log10(min(widths, default=1.0))))
    texts = [[f"{value:.{digits}f}" for value in row] for row in rows]
    widest = max((len(text) for row in texts for text in row), default=0)
    return [f"{mean:>{widest}} ({low:>{widest}} to {high:>{widest}})" for mean, low, high in texts]


class HeadRoom(NamedTuple):
    """Mean rewards of ways to choose among K timesteps, and their differences, paired by image."""

    images: int
    fixed: int
    """Index of the best fixed timestep, as the training images chose it."""
    estimates: dict[str, Estimate]
    """`uniform`: every timestep alike. `fixed`: that one for all. `constant`: the best one for all
    by the rewards of the other images here; `learnt`: by a linear rule on the context, from those.
    `honest`: the best of every image by the other draws of the noise, scored by the one left out.
    `oracle`: the best of every image and draw, by that draw itself.
    `fixed_gain`: fixed over uniform; `learnt_gain`, `honest_gain`, `oracle_gain`: over constant, so
    that a better timestep for all is no gain of choosing by image; `chance`: oracle over honest."""


def head_room(rewards: Tensor, held_loss: Tensor, contexts: Tensor) -> HeadRoom:
    """The head-room of one layer.

    The oracle takes the noise of a draw for a property of the image, so that it gains even where
    nothing is to be gained. The honest one does not, but it still knows the label: it leaves a
    probe that errs for one that hesitates. What a policy can gain from the image alone lies between
    the learnt rule, which is a simple one, and the honest oracle.

    Args:
        rewards: (R, N, K), by draw of the noise, image and timestep; an image with a NaN is left
            out. With one draw, or noise that plays no part, honest and oracle are the same.
        held_loss: (K,), to choose the fixed timestep by: of other images.
        contexts: (N, D), what a policy may see of each image.

    Raises:
        ValueError: no image is left.
    """
    known = ~rewards.isnan().any(2).any(0)
    rewards, contexts = rewards[:, known].double(), contexts[known].double()
    draws, images, _ = rewards.shape
    if not images:
        raise ValueError("no image has a reward at every timestep")
    fixed = int(held_loss.argmin())
    generator = torch.Generator().manual_seed(0)  # of the folds and the bootstrap
    constant, learnt = _chosen(contexts, rewards.mean(0), fixed, generator)
    others = (rewards.sum(0) - rewards) / (draws - 1) if draws > 1 else rewards
    honest = rewards.gather(2, others.argmax(2, keepdim=True)).mean((0, 2))  # (N,)
    ways = {
        "uniform": rewards.mean((0, 2)),
        "fixed": rewards[:, :, fixed].mean(0),
        "constant": rewards.mean(0).gather(1, constant[:, None])[:, 0],
        "learnt": rewards.mean(0).gather(1, learnt[:, None])[:, 0],
        "honest": honest,
        "oracle": rewards.amax(2).mean(0),
    }
    ways |= {
        "fixed_gain": ways["fixed"] - ways["uniform"],
        "learnt_gain": ways["learnt"] - ways["constant"],
        "honest_gain": ways["honest"] - ways["constant"],
        "oracle_gain": ways["oracle"] - ways["constant"],
        "chance": ways["oracle"] - ways["honest"],
    }
    values = torch.stack(list(ways.values()), dim=1)  # (N, ways)
    resampled = torch.stack(
        [
            values[torch.randint(images, (images,), generator=generator)].mean(0)
            for _ in range(RESAMPLES)
        ]
    )
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    means = values.mean(0)
    return HeadRoom(
        images,
        fixed,
        {
            name: Estimate(means[i].item(), low[i].item(), high[i].item())
            for i, name in enumerate(ways)
        },
    )


def _chosen(
    contexts: Tensor, rewards: Tensor, fixed: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The timesteps (N,) of each image that suit the other folds: one for all of a fold, and by a
    ridge regression of rewards (N, K) on contexts (N, D). With too few images both are `fixed`."""
    images = len(rewards)
    constant = torch.full((images,), fixed)
    learnt = constant.clone()
    if images < 2 * FOLDS:
        return constant, learnt
    order = torch.randperm(images, generator=generator)
    gains = rewards - rewards.mean(1, keepdim=True)  # how hard an image is plays no part
    for fold in range(FOLDS):
        mine = torch.zeros(images, dtype=torch.bool)
        mine[order[fold::FOLDS]] = True
        x, y = contexts[~mine], gains[~mine]
        centre, base, spread = x.mean(0), y.mean(0), x.std(0, correction=0) + 1e-6
        x = (x - centre) / spread
        penalty = len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - base))
        constant[mine] = base.argmax()
        learnt[mine] = (base + (contexts[mine] - centre) / spread @ weight).argmax(1)
    return constant, learnt
