"""The learning rate as a function of the step alone, and the optimiser of an arm."""

from __future__ import annotations

import math
from typing import Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from distill.config import TrainConfig


def lr_factor(
    schedule: Literal["cosine", "step", "constant"], step: int, steps: int, warmup: int
) -> float:
    """Share of the largest learning rate at `step` of `steps`, in (0, 1].

    A linear warm-up, then half a cosine to 0, or a tenth at one half and again at three quarters
    (the published RepFusion schedule), or no change.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    if schedule == "step":
        return 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    return 1.0


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """timm's AdamW, or SGD with Nesterov momentum 0.9; norms and biases are not decayed."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=train.optimizer,
        lr=train.lr,
        weight_decay=train.weight_decay,
        momentum=0.9,
        fused=True,  # one pass over the weights: a quarter of the time, on a CPU too
    )
    return optimizer
