"""Feature maps to compare, and a feature loss of maps as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.matching.losses import FeatureLoss

T = torch.zeros(4, dtype=torch.int64)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(name: str, student: Tensor, teacher: Tensor, **settings: object) -> Tensor:
    """The loss of maps as they are: no standardisation, no projector."""
    loss = FeatureLoss(
        name, student.shape[1], teacher.shape[1], projector="none", standardise=False, **settings
    )
    return loss(student, teacher, T[: len(student)])
