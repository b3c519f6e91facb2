"""The head-room: by hand, where all is chance, and where something is to be gained."""

from __future__ import annotations

import pytest
import torch

from distill.probing.head_room import Estimate, head_room, written


def test_two_images_and_two_draws_by_hand() -> None:
    rewards = torch.tensor(
        [
            [[1.0, 0.0, 0.0], [0.0, 3.0, 1.0]],
            [[0.0, 2.0, 1.0], [0.0, 5.0, 2.0]],
        ]
    )
    room = head_room(rewards, torch.tensor([2.0, 3.0, 1.0]), torch.zeros(2, 1))
    means = {name: estimate.mean for name, estimate in room.estimates.items()}
    assert (room.images, room.fixed) == (2, 2)
    assert means["uniform"] == pytest.approx((4 / 6 + 11 / 6) / 2)
    assert means["fixed"] == (0.5 + 1.5) / 2
    assert means["oracle"] == (1.5 + 4) / 2
    # Image 0: draw 0 says t 0, which earns 0 in draw 1; draw 1 says t 1, which earns 0 in draw 0.
    assert means["honest"] == (0 + 4) / 2
    assert means["learnt"] == means["fixed"]  # of two images none can be spared
    assert means["honest_gain"] == means["honest"] - means["fixed"]
    assert means["chance"] == means["oracle"] - means["honest"]


def test_where_all_is_noise_the_oracle_gains_and_the_honest_one_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 3000, 8, generator=generator)
    contexts = torch.randn(3000, 5, generator=generator)
    told = head_room(rewards, torch.zeros(8), contexts).estimates
    assert told["learnt_gain"].low < 0 < told["learnt_gain"].high
    assert told["oracle_gain"].mean == pytest.approx(1.42, abs=0.1)  # the mean of the largest of 8
    assert told["honest_gain"].low < 0 < told["honest_gain"].high
    assert told["chance"].low > 1.3


def test_what_images_differ_in_is_gained_honestly() -> None:
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(3000, 8, generator=generator)
    rewards = own + 0.1 * torch.randn(2, 3000, 8, generator=generator)
    told = head_room(rewards, torch.zeros(8), own[:, :2]).estimates
    assert told["learnt_gain"].low > 0.3  # two of the eight stand in the context
    moved = head_room(rewards, torch.zeros(8), 100 + 10 * own[:, :2]).estimates  # whatever the unit
    assert moved["learnt"].mean == pytest.approx(told["learnt"].mean, abs=1e-3)
    assert told["learnt_gain"].high < 0.8
    assert told["honest_gain"].mean == pytest.approx(1.42, abs=0.1)
    assert 0 <= told["chance"].mean < 0.05


def test_a_better_timestep_for_all_is_no_gain_of_choosing_by_image() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = 0.01 * torch.randn(2, 500, 8, generator=generator)
    rewards[:, :, 3] += 0.05
    held_loss = torch.ones(8)
    held_loss[0] = 0.9  # few training images chose another
    room = head_room(rewards, held_loss, torch.randn(500, 5, generator=generator))
    assert room.fixed == 0
    told = room.estimates
    assert told["constant"].mean - told["fixed"].mean == pytest.approx(0.05, abs=0.002)
    assert told["learnt_gain"].low <= 0 <= told["learnt_gain"].high
    assert told["honest_gain"].mean < 0.002


def test_the_interval_is_that_of_a_mean() -> None:
    rewards = torch.randn(1, 2500, 1, generator=torch.Generator().manual_seed(2))
    mean, low, high = head_room(rewards, torch.zeros(1), torch.zeros(2500, 1)).estimates["fixed"]
    assert mean - low == pytest.approx(1.96 / 50, rel=0.15)
    assert high - mean == pytest.approx(1.96 / 50, rel=0.15)


def test_narrow_intervals_are_written_with_the_decimals_they_need_in_columns() -> None:
    wide, narrow = Estimate(-1.5, -2.0, -1.0), Estimate(0.00021, 0.0, 0.0004)
    assert written([wide]) == ["-1.500 (-2.000 to -1.000)"]
    assert written([wide, narrow]) == [
        "-1.5000 (-2.0000 to -1.0000)",
        " 0.0002 ( 0.0000 to  0.0004)",
    ]
    assert written([Estimate(1, 1, 1)]) == ["1.000 (1.000 to 1.000)"]


def test_images_without_a_reward_are_left_out() -> None:
    rewards = torch.tensor([[[1.0, 2.0], [torch.nan, 9.0]]])
    room = head_room(rewards, torch.tensor([1.0, 0.0]), torch.zeros(2, 3))
    assert room.images == 1
    assert room.estimates["oracle"] == (2, 2, 2)
    with pytest.raises(ValueError, match="no image has a reward"):
        head_room(rewards[:, 1:], torch.zeros(2), torch.zeros(1, 3))


def test_a_rule_on_the_context_is_scored_on_images_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(7)
    side = torch.randint(2, (40,), generator=generator)
    rewards = torch.stack([side, 1 - side], dim=1).float().expand(2, -1, -1)
    contexts = torch.stack([side.float(), torch.randn(40, generator=generator)], dim=1)
    told = head_room(rewards, torch.tensor([0.0, 1.0]), contexts).estimates
    assert told["learnt"] == told["honest"] == (1, 1, 1)
    one_each = torch.eye(40)  # what tells the images apart and says nothing about them
    assert head_room(rewards, torch.tensor([0.0, 1.0]), one_each).estimates["learnt"].mean < 0.7
