"""The trained weights of an arm, their optimiser, and its learning rate at every step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from distill.config import TrainConfig
from students.student import Student


def lr_factor(
    schedule: Literal["cosine", "step", "poly", "constant"], step: int, steps: int, warmup: int
) -> float:
    """Share of the largest learning rate at `step` of `steps`, in (0, 1].

    A linear warm-up, then half a cosine to 0, or a tenth at one half and again at three quarters
    (the published RepFusion schedule), or the share of steps left to the power 0.9 (DeepLab, Chen
    et al. 2017), or no change. The warm-up takes half of the steps at most.
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    if schedule == "poly":
        return math.pow(1 - (step - warmup) / max(1, steps - warmup), 0.9)
    if schedule == "step":
        return 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    return 1.0


def stage(train: TrainConfig, step: int, taught: bool) -> tuple[int, int]:
    """First step and end of the stage that a step belongs to.

    The paper's schedule has two, each with a learning rate and an average of its own; only an arm
    with a teacher (`taught`) has more than one.
    """
    if train.schedule == "joint" or not taught:
        return 0, train.steps
    border = train.steps - train.finetune_steps
    return (0, border) if step < border else (border, train.steps)


def stage_lr_factor(train: TrainConfig, step: int, taught: bool) -> float:
    """`lr_factor` within the stage."""
    first, last = stage(train, step, taught)
    return lr_factor(train.lr_schedule, step - first, last - first, train.warmup)


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """timm's AdamW, or SGD with momentum 0.9: Nesterov's for "sgd", plain for "momentum"."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=train.optimizer,
        lr=train.lr,
        weight_decay=train.weight_decay,
        momentum=0.9,
        filter_bias_and_bn=not train.decay_all,
        # One pass over the weights: a quarter of the time, on a CPU too. torch's SGD cannot where
        # some weights get their first gradient late, as a head does in fine-tuning.
        fused=train.optimizer == "adamw" or None,
    )
    return optimizer


def freeze_backbone(student: Student) -> None:
    """Leave only the head to train; batch norms keep their statistics."""
    student.backbone.requires_grad_(False).eval()
    if student.head is None:
        student.backbone.get_classifier().requires_grad_(True)
