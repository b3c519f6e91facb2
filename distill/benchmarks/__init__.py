"""Benchmarks: images with targets, split into train, val and test. One benchmark, one file.

A benchmark of your own is any object with the attributes of `Benchmark`, built by a class or a
function as `yours(root, **options)`; nothing is registered, nothing inherited.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import UserError

IGNORE_INDEX = 255
"""The target of a pixel or image without a label."""

Entry = TypeVar("Entry")
Task = Literal["segmentation", "classification", "landmarks"]


class Examples(Protocol):
    """Images with their targets, read by index: what torch calls a map-style dataset.

    An image is (3, H, W) uint8 at its file's own size. Its target is a mask (H, W) uint8 for
    segmentation, an `int` for classification; `IGNORE_INDEX` says that there is no label. For
    landmarks the image is square and the target (K, 2) float32, the x and y of each point as shares
    of the image's side, from its upper left corner; a point may lie outside.
    Two attributes are used where they exist: `names`, one an example, in the fingerprint of a run,
    and `targets`, one class an example, to choose labelled images that cover all classes.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor | int]: ...


class Benchmark(Protocol):
    """The interface of a benchmark for training and evaluation.

    Two more members are used where they exist: `unlabelled()` gives Examples without targets, or
    None, that are distilled on beside the training split; `mirrored`, a class for each class, says
    what it is called in the mirror image (the left eye is the right one), where it is not empty.
    """

    @property
    def name(self) -> str: ...

    @property
    def task(self) -> Task | None:
        """None: images without labels, for training a teacher."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def ignore_index(self) -> int: ...

    @property
    def palette(self) -> NDArray[np.uint8]:
        """(num_classes, 3), the RGB colour of each class in pictures."""

    def dataset(self, split: str, /) -> Examples:
        """The examples of "train", "val" or "test"; a UserError for an unknown split."""


class LandmarkBenchmark(Benchmark, Protocol):
    """The further interface for the task "landmarks", whose classes are the K points of an
    image."""

    @property
    def mirrored(self) -> tuple[int, ...]:
        """(K,), which point each becomes in the mirror image."""

    @property
    def eyes(self) -> tuple[int, int]:
        """The points whose distance is the unit of errors: the outer corners of the eyes."""


def notice(line: str) -> None:
    """Report on stderr what is unusual about the data but not an error."""
    print(f"distill: {line}", file=sys.stderr, flush=True)


def hold_out(length: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split `range(length)` by the seed into (kept, held), `count` of them held; both ascending."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def hold_out_share(
    items: Sequence[Entry], ratio: float, seed: int, key: str
) -> tuple[list[Entry], list[Entry]]:
    """Split `items` by the seed into (kept, held), a share of them held; both in their order.

    At least one is kept and one held.

    Args:
        items: At least two.
        ratio: Between 0 and 1.
        seed: Chooses them.
        key: The recipe's key of `ratio`, for the error line.
    """
    if not 0.0 < ratio < 1.0 or len(items) < 2:
        raise UserError(
            f"{key}: {ratio} of {len(items)} images leaves a split empty; use a share between 0 "
            "and 1, or write lists"
        )
    count = min(max(round(ratio * len(items)), 1), len(items) - 1)
    kept, held = hold_out(len(items), count, seed)
    return [items[index] for index in kept], [items[index] for index in held]


def distinct_colours(count: int) -> NDArray[np.uint8]:
    """(count, 3) colours; hues a golden angle apart, so that neighbours differ most. Of more than
    48, where hues come close to each other, those of `colour_map`."""
    if count > 48:
        return colour_map(count)
    colours = [
        colorsys.hsv_to_rgb((0.58 + 0.381966 * i) % 1.0, (0.75, 0.5)[i % 2], (0.9, 0.7, 0.5)[i % 3])
        for i in range(count)
    ]
    return np.round(255.0 * np.array(colours).reshape(count, 3)).astype(np.uint8)


def colour_map(count: int) -> NDArray[np.uint8]:
    """(count, 3), those of VOC 2012, distinct up to 512: bits 0 to 2 of a class number are the top
    bits of red, green and blue, bits 3 to 5 the next, and so on."""
    numbers = np.arange(count)[:, None] >> np.arange(3)
    bits = sum((numbers >> 3 * bit & 1) << 7 - bit for bit in range(3))
    return np.asarray(bits, dtype=np.uint8)
