"""Seed the global random states that libraries draw from in a block, and restore them after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block (weight initialisation), then restore it."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which are not restored here
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield


@contextmanager
def seeded_numpy(seed: int, step: int) -> Iterator[None]:
    """Seed numpy's global generator from (seed, step) for the block, then restore it.

    stable-baselines3 shuffles its minibatches with it, so a resumed run needs it to depend on the
    step alone.
    """
    before = np.random.get_state()
    np.random.seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
    try:
        yield
    finally:
        np.random.set_state(before)
