"""Moments of samples, and gathering them over the processes that train one model."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def of_all(rows: Tensor) -> Tensor:
    """Rows of this process (N, ...) -> rows of all, rank after rank; N must be equal for all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of samples (N, ...), several times faster than torch's `var` on a CPU."""
    mean = samples.mean(dim=0)
    return mean, (samples - mean).square_().mean(dim=0)


def moments_of_all(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of this process's samples -> of all, which must have equal numbers."""
    means, variances = of_all(torch.stack([mean, variance])[None]).unbind(dim=1)
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
