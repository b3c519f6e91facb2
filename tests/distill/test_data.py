"""Batches are a pure function of seed and step."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from distill.augmentation import Item, Strength, augmentation
from distill.data import (
    Augmented,
    Draw,
    InMemory,
    Resized,
    StepSampler,
    choose_labelled,
    fingerprint,
    in_order,
    loader,
    spread,
)
from distill.errors import UserError


class Blocks:
    """24x32 images: red channel 255 exactly where the mask is 1. Counts its reads."""

    def __init__(self, length: int, task: str = "segmentation") -> None:
        self.length, self.task, self.reads = length, task, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        self.reads += 1
        generator = torch.Generator().manual_seed(index)
        mask = torch.rand(3, 4, generator=generator).gt(0.5).byte()
        mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = torch.stack([mask * 255, torch.full_like(mask, 100), torch.full_like(mask, index)])
        return image, mask if self.task == "segmentation" else index


def batches(
    workers: int, start_step: int = 0, stop_step: int = 5, strength: Strength = "strong"
) -> list[tuple[Tensor, Tensor]]:
    examples = InMemory(Resized(Blocks(10), (12, 16), masks=True), room=1e9)
    sampler = StepSampler(range(10), 4, seed=3, start_step=start_step, stop_step=stop_step)
    augmented = Augmented(examples, augmentation(strength, "segmentation", (12, 16)))
    return [(images, masks) for images, masks in loader(augmented, sampler, workers)]


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def test_batches_are_bit_equal_with_and_without_workers() -> None:
    assert equal(batches(workers=0), batches(workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_come_in_order_as_they_are(workers: int) -> None:
    examples = Blocks(5)
    parts = list(in_order(examples, [3, 0, 4], batch=2, workers=workers))
    assert [len(items) for items in parts] == [2, 1]
    for (image, mask), index in zip(itertools.chain(*parts), [3, 0, 4], strict=True):
        expected = examples[index]
        assert torch.equal(image, expected[0])
        assert torch.equal(torch.as_tensor(mask), torch.as_tensor(expected[1]))


class OneOfThem(UserError):
    pass


class Damaged(Blocks):
    kind = UserError

    def __getitem__(self, index: int) -> Item:
        raise self.kind(f"{index}.png: cannot be decoded")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [UserError, OneOfThem])
def test_a_mistake_in_a_worker_is_told_as_one_of_this_process(
    workers: int, kind: type[UserError]
) -> None:
    examples = Damaged(5)
    examples.kind = kind
    with pytest.raises(UserError) as caught:
        next(in_order(examples, [3], batch=1, workers=workers))
    assert str(caught.value) == "3.png: cannot be decoded"


def test_resumed_batches_equal_those_of_an_uninterrupted_run() -> None:
    assert equal(batches(workers=0)[3:], batches(workers=0, start_step=3))


def test_batches_depend_on_nothing_drawn_before_and_leave_the_default_generator_alone() -> None:
    torch.manual_seed(0)
    first = batches(workers=0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert equal(first, batches(workers=0))


def test_batches_are_float_images_in_0_1_and_int64_masks() -> None:
    images, masks = batches(workers=0)[0]
    assert images.shape == (4, 3, 12, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0.0
    assert 0.5 < images.max() <= 1.0
    assert masks.shape == (4, 12, 16)
    assert masks.dtype == torch.int64


def test_the_images_of_two_epochs_are_augmented_differently() -> None:
    sampler = StepSampler([0], 1, seed=0)
    assert sampler.batch(0)[0].seed != sampler.batch(1)[0].seed


def test_every_epoch_holds_every_example_once_across_batch_borders() -> None:
    sampler = StepSampler(range(10, 17), 3, seed=1)
    drawn = [draw.example for step in range(14) for draw in sampler.batch(step)]
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_are_full_even_when_there_are_fewer_examples_than_a_batch_holds() -> None:
    counts = Counter(draw.example for draw in StepSampler(range(3), 8, seed=0).batch(2))
    assert sum(counts.values()) == 8
    assert set(counts) == {0, 1, 2}


def test_the_processes_together_draw_what_one_process_draws() -> None:
    alone = StepSampler(range(11), 6, seed=2)
    shared = [StepSampler(range(11), 2, seed=2, rank=rank, world=3) for rank in range(3)]
    for step in range(5):
        assert [draw for sampler in shared for draw in sampler.batch(step)] == alone.batch(step)


def test_the_seed_changes_the_order() -> None:
    one, other = (StepSampler(range(50), 50, seed=seed).batch(0) for seed in (0, 1))
    assert one != other


def test_iteration_starts_and_stops_at_the_given_steps() -> None:
    sampler = StepSampler(range(5), 2, seed=0, start_step=4, stop_step=7)
    assert list(sampler) == [sampler.batch(4), sampler.batch(5), sampler.batch(6)]


def test_sampler_refuses_no_examples_and_empty_batches() -> None:
    with pytest.raises(UserError, match="there are no examples"):
        StepSampler([], 4, seed=0)
    with pytest.raises(UserError, match="at least one image, got 0"):
        StepSampler([1], 0, seed=0)


def test_resizing_shrinks_training_masks_and_leaves_evaluation_masks() -> None:
    image, mask = Resized(Blocks(1), (6, 8), masks=True)[0]
    assert isinstance(mask, Tensor)
    assert image.shape == (3, 6, 8)
    assert image.dtype == torch.uint8
    assert torch.equal(mask, Blocks(1)[0][1][2::4, 2::4])  # type: ignore[index]
    image, mask = Resized(Blocks(1), (6, 8), masks=False)[0]
    assert isinstance(mask, Tensor)
    assert image.shape == (3, 6, 8)
    assert mask.shape == (24, 32)


def test_resized_mask_takes_the_pixel_at_the_centre_of_each_new_one() -> None:
    mask = torch.arange(8, dtype=torch.uint8)[None].repeat(4, 1)
    _, resized = Resized([(torch.zeros(3, 4, 8, dtype=torch.uint8), mask)], (1, 2), masks=True)[0]
    assert isinstance(resized, Tensor)
    assert resized.tolist() == [[2, 6]]


def test_in_memory_reads_each_example_once() -> None:
    blocks = Blocks(3)
    kept = InMemory(blocks, room=1e9)
    assert torch.equal(kept[1][0], kept[1][0])
    assert kept[2][0] is kept[2][0]
    assert blocks.reads == 2
    assert len(kept) == 3


def test_in_memory_reads_again_what_has_no_room() -> None:
    blocks = Blocks(3)
    size = sum(x.nbytes for x in blocks[0] if isinstance(x, torch.Tensor))
    blocks.reads = 0
    kept = InMemory(blocks, room=2 * size)
    for _ in range(2):
        for index in range(3):
            assert torch.equal(kept[index][0], Blocks(3)[index][0])
    assert blocks.reads == 4


def test_augmentation_does_not_change_what_is_kept_in_memory() -> None:
    kept = InMemory(Blocks(1), room=1e9)
    before = kept[0][0].clone()
    Augmented(kept, augmentation("strong", "segmentation", (24, 32)))[Draw(0, 0)]
    assert torch.equal(kept[0][0], before)


def test_smaller_label_choices_are_part_of_larger_ones() -> None:
    for targets in (None, [index % 4 for index in range(100)]):
        chosen = choose_labelled(100, 40, 7, targets)
        assert choose_labelled(100, 13, 7, targets) == chosen[:13]
        assert len(set(chosen)) == 40
        assert choose_labelled(100, 40, 8, targets) != chosen


def test_label_choice_is_balanced_as_long_as_classes_last() -> None:
    targets = [0] * 90 + [1] * 8 + [2] * 2
    counts = Counter(targets[index] for index in choose_labelled(100, 9, 0, targets))
    assert counts == {0: 4, 1: 3, 2: 2}
    assert sorted(choose_labelled(100, 100, 0, targets)) == list(range(100))


@pytest.mark.parametrize("count", [0, 11])
def test_label_choice_outside_the_split_is_refused(count: int) -> None:
    with pytest.raises(
        UserError, match=rf"must be between 1 and 10 \(the training images\), got {count}"
    ):
        choose_labelled(10, count, 0)


def test_images_without_a_label_are_not_chosen_as_labelled() -> None:
    targets = [0, 255, 1, 255, 0]
    assert sorted(choose_labelled(5, None, 0, targets, ignore_index=255)) == [0, 2, 4]
    assert sorted(choose_labelled(5, None, 0, targets, ignore_index=-1)) == list(range(5))
    with pytest.raises(UserError, match="must be between 1 and 3 \\(the training images\\), got 4"):
        choose_labelled(5, 4, 0, targets, ignore_index=255)
    with pytest.raises(UserError, match=r"^data: no image has a label$"):
        choose_labelled(2, None, 0, [255, 255], ignore_index=255)


def test_fingerprint_tells_names_and_lengths_apart() -> None:
    named = Blocks(2)
    named.names = ["a", "b"]  # type: ignore[attr-defined]
    renamed = Blocks(2)
    renamed.names = ["a", "c"]  # type: ignore[attr-defined]
    prints = {fingerprint(examples) for examples in (Blocks(2), Blocks(3), named, renamed)}
    assert len(prints) == 4
    assert fingerprint(Blocks(2)) == fingerprint(Blocks(2))
    named.names = ["a", "caf\udce9"]  # type: ignore[attr-defined]  # as a Latin-1 name is listed
    assert fingerprint(named) not in prints


def test_indices_are_spread_from_the_first_on_and_are_no_more_than_there_are() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(2, 5) == [0, 1]
    assert spread(0, 5) == []
