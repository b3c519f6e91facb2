"""From a distribution over bins to one bin per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

EXPLODED = "the policy diverged: its outputs are no longer finite; try a smaller learning_rate"


def check_finite(outputs: Tensor) -> None:
    """Raises ValueError if a network's outputs are not finite: its weights have exploded."""
    if not bool(outputs.isfinite().all()):
        raise ValueError(EXPLODED)


def draw(probabilities: Tensor, generator: Generator) -> Tensor:
    """Draw one bin per image: probabilities (B, K) -> (B,) int64.

    Raises:
        ValueError: they are not finite, because a network's weights have exploded.
    """
    check_finite(probabilities)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@contextmanager
def of_finite_logits() -> Iterator[None]:
    """Turn the error of torch's distributions about NaN logits into `EXPLODED`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(EXPLODED) from error
