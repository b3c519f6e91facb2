"""From a distribution over bins to a bin an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

EXPLODED = "the policy diverged: its outputs are no longer finite; try a smaller learning_rate"


def check_finite(outputs: Tensor) -> None:
    """Raises ValueError where a network's outputs are not finite: its weights have exploded."""
    if not bool(outputs.isfinite().all()):
        raise ValueError(EXPLODED)


def draw(probabilities: Tensor, generator: Generator) -> Tensor:
    """A bin an image: probabilities (B, K) -> (B,) int64.

    Raises:
        ValueError: they are not finite, as of a network whose weights have exploded.
    """
    check_finite(probabilities)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@contextmanager
def of_finite_logits() -> Iterator[None]:
    """Around torch's own distributions, which refuse logits that are no numbers: the same line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(EXPLODED) from error
