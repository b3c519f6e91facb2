"""From a benchmark's examples to batches, in an order that can be resumed.

What a step sees is a pure function of (seed, step), independent of the number of workers and of
earlier draws. That makes an interrupted and resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from distill import seeding
from distill.augmentation import Augmentation, Item, resize_image, resize_mask
from distill.benchmarks import Examples
from distill.errors import UserError


class Resized:
    """`examples` with images of one size, by antialiased bilinear interpolation.

    Args:
        examples: Images (3, h, w) uint8 and their targets.
        size: (H, W) of the images that come out.
        masks: Whether masks are resized too (nearest pixel), for training. Predictions are scored
            on masks as they are.
    """

    def __init__(self, examples: Examples, size: tuple[int, int], *, masks: bool) -> None:
        self.examples, self.size, self.masks = examples, size, masks

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        image, target = self.examples[index]
        if self.masks and isinstance(target, Tensor):
            target = resize_mask(target, self.size)
        return resize_image(image, self.size), target


class InMemory:
    """`examples`, each kept in memory once it is read, while there is room; worker processes do not
    share them.

    Args:
        examples: Images and their targets.
        room: Bytes to keep at most.
    """

    def __init__(self, examples: Examples, room: float) -> None:
        self.examples, self._room = examples, room
        self._kept: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        if index in self._kept:
            return self._kept[index]
        item = self.examples[index]
        size = sum(x.nbytes for x in item if isinstance(x, Tensor))
        if size <= self._room:
            self._kept[index] = item
            self._room -= size
        return item


def as_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1], any shape."""
    return image.float().div(255.0)


class Draw(NamedTuple):
    """An example's index, the seed of its augmentation, and its position among `indices`."""

    example: int
    seed: int
    position: int = -1


class Augmented(Dataset[Item]):
    """Examples addressed by `Draw`: image (3, H, W) float32 in [0, 1], mask int64 or class."""

    def __init__(self, examples: Examples, augment: Augmentation) -> None:
        self.examples, self.augment = examples, augment

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> Item:
        return self.view(*self.examples[draw.example], draw.seed)

    def view(self, image: Tensor, target: Tensor | int, seed: int) -> Item:
        """An example, augmented as the seed decides."""
        with seeding.seeded_torch(seed):
            image, target = self.augment(image, target)
        if isinstance(target, Tensor) and not target.is_floating_point():
            target = target.long()  # classes; depths and landmarks stay what they are
        return as_float(image), target


class Tagged(Dataset[tuple[Tensor, Tensor | int, Tensor]]):
    """Views that are at most flipped, each with a tag for a cache that says what it shows.

    A tag is (3,) int64: the example, whether it is flipped, and a checksum of the example's image,
    which is never 0.
    """

    def __init__(self, views: Augmented) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor | int, Tensor]:
        original, target = self.views.examples[draw.example]
        image, target = self.views.view(original, target, draw.seed)
        flipped = not torch.equal(image, as_float(original))
        checksum = zlib.crc32(original.contiguous().numpy().data) or 1
        return image, target, torch.tensor([draw.example, int(flipped), checksum])


class StepSampler(Sampler[list[Draw]]):
    """The draws of every step, computed from the step's number alone.

    The examples come in one permutation per epoch. Batches cross the border of two epochs, so that
    each is full, however few examples there are. A global batch has `world` batches.

    Args:
        indices: The examples to draw from.
        batch: Images per step and process.
        seed: The run's seed.
        rank: This process.
        world: Number of processes.
        start_step: First step of the iteration, to resume.
        stop_step: End of the iteration; None: it never ends.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        if not indices:
            raise UserError("data: there are no examples to draw from")
        if batch < 1:
            raise UserError(f"data: a batch must have at least one image, got {batch}")
        assert 0 <= rank < world
        self.indices, self.batch_size, self.seed = indices, batch, seed
        self.rank, self.world = rank, world
        self.start_step, self.stop_step = start_step, stop_step
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int) -> list[Draw]:
        """The draws of this process at a step, counted from 0."""
        first = (step * self.world + self.rank) * self.batch_size
        draws = []
        for drawn in range(first, first + self.batch_size):
            epoch, position = divmod(drawn, len(self.indices))
            order, seeds = self._epoch(epoch)
            draws.append(Draw(self.indices[order[position]], seeds[position], order[position]))
        return draws

    def _draw_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The order of an epoch and the seed of each position in it."""
        # The 0 is there for the orders of older runs.
        state = np.random.SeedSequence([self.seed, 0, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        order = torch.randperm(len(self.indices), generator=generator)
        seeds = torch.randint(2**62, (len(self.indices),), generator=generator)
        return order.tolist(), seeds.tolist()

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            yield self.batch(step)
            step += 1


def loader(
    examples: Augmented | Tagged, sampler: Iterable[list[Draw]], workers: int = 0
) -> Iterator[Any]:
    """Batches in the sampler's order: images (B, 3, H, W) float32, targets (B, H, W) or (B,) int64;
    where the examples are `Tagged` their tags (B, 3) int64 too.

    The images of a batch must have one size: augment to it, or wrap `examples` in `Resized`.

    Raises:
        UserError: of an example; a worker process's comes without its traceback.
    """
    yield from _mended(
        DataLoader(
            examples,
            batch_sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise it draws from, and so moves, the default one
        )
    )


def in_order(
    examples: Examples, indices: Sequence[int], batch: int, workers: int = 0
) -> Iterator[list[Item]]:
    """The examples at `indices` without augmentation, up to `batch` at a time, of any sizes.

    Raises:
        UserError: As `loader`.
    """
    batches: DataLoader[Any] = DataLoader(
        Subset(examples, indices),  # type: ignore[arg-type]  # it has what Subset asks for
        batch_size=batch,
        num_workers=workers,
        collate_fn=_as_arrays,
        generator=torch.Generator(),
    )
    for items in _mended(batches):
        yield [(torch.from_numpy(image), torch.as_tensor(target)) for image, target in items]


def _as_arrays(items: Sequence[Item]) -> list[tuple[Any, Any]]:
    """Convert tensors to arrays for transfer from a worker: each tensor would need a file
    handle."""
    return [
        (image.numpy(), target.numpy() if isinstance(target, Tensor) else target)
        for image, target in items
    ]


def _mended(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of a loader, with a worker's UserError raised as if it came from this process."""
    try:
        yield from batches
    except UserError as error:
        # A worker's message is its traceback, which ends with the class and the message.
        text = str(error).rpartition(f"{type(error).__name__}: ")[2]
        raise UserError(text.strip()) from error


def choose_labelled(
    length: int,
    count: int | None,
    seed: int,
    targets: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> list[int]:
    """Choose which training examples keep their labels.

    They are the first `count` of one seeded order, so a smaller choice is part of a larger one.

    Args:
        length: Number of training examples.
        count: Number of labelled ones; None: all.
        seed: Decides the order.
        targets: Class of each example. If given, classes take turns in the order, so that the
            choice is balanced.
        ignore_index: The target of examples without a label, which are not chosen.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    if targets is not None and ignore_index is not None:
        order = [index for index in order if targets[index] != ignore_index]
    if not order:
        raise UserError("data: no image has a label")
    if count is not None and not 1 <= count <= len(order):
        raise UserError(
            f"data.labelled: must be between 1 and {len(order)} (the training images), got {count}"
        )
    if targets is not None:
        seen: Counter[int] = Counter()
        rounds = []
        for index in order:
            rounds.append(seen[targets[index]])
            seen[targets[index]] += 1
        order = [index for _, index in sorted(zip(rounds, order, strict=True), key=lambda p: p[0])]
    return order[:count]


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices of 0..length-1, evenly spread, as neighbours are alike in videos."""
    count = min(count, length)
    return [step * length // count for step in range(count)]


def fingerprint(examples: Examples) -> str:
    """sha256 over the number of examples and, where they have any, their names; 64 hex digits."""
    names: Sequence[str] = getattr(examples, "names", ())
    text = "\n".join([str(len(examples)), *names])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
