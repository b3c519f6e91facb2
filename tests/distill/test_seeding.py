"""Randomness as a function of its purpose: the same for the same, another for any other."""

from __future__ import annotations

import itertools
from typing import get_args

import torch

from distill.seeding import Stream, derive_seed, generator


def test_every_use_of_randomness_has_its_own_seed() -> None:
    uses = list(itertools.product(range(3), get_args(Stream), range(5), range(3)))
    assert len({derive_seed(*use) for use in uses}) == len(uses) == 405


def test_seeds_suit_torch() -> None:
    assert all(0 <= derive_seed(seed, "noise") < 2**63 for seed in range(100))


def test_seeds_stay_the_same_from_version_to_version() -> None:
    assert derive_seed(0, "labelled") == 7896617691693857887
    assert derive_seed(7, "policy", step=12, rank=1) == 927951227322819389


def test_a_generator_repeats_itself_and_leaves_the_default_one_alone() -> None:
    before = torch.get_rng_state()
    first, again = (torch.rand(4, generator=generator(1, "noise", 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "noise", 3)))
    assert torch.equal(torch.get_rng_state(), before)
