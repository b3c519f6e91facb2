"""Randomness as a pure function of (seed, stream, step): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch

Stream = Literal[
    "labelled", "unlabelled", "noise", "policy", "network", "samples", "floor", "cache", "probe"
]
_STREAMS: tuple[Stream, ...] = get_args(Stream)


def derive_seed(seed: int, stream: Stream, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for one use of randomness at one step of one process."""
    words = [seed, _STREAMS.index(stream), step, rank]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(
    seed: int,
    stream: Stream,
    step: int = 0,
    rank: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A generator for one use of randomness at one step of one process.

    On a GPU it draws other numbers than on the CPU, and faster.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, step, rank))


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator for the block, then put it back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed CUDA's generators as well.
        torch.default_generator.manual_seed(seed)
        yield
