"""The interfaces of benchmarks of correspondence and of depth, beside or without class labels.

One of your own is any object with the attributes of `CorrespondenceBenchmark` or `DepthBenchmark`,
built as `yours(root, **options)`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from distill.benchmarks import Examples


class KeypointPair(NamedTuple):
    """Two images of one category, and the points of the one that are those of the other.

    Points are (x, y) in pixels of their own image: pixel i reaches from i to i + 1, its centre is
    at i + 0.5.
    """

    names: tuple[str, str]
    """Names of the two images; equal names are equal images."""
    source: Tensor
    """(3, H, W) uint8."""
    target: Tensor
    """(3, h, w) uint8."""
    source_points: Tensor
    """(N, 2) float32, N at least 1."""
    target_points: Tensor
    """(N, 2) float32."""
    box: Tensor
    """(4,) float32: left, top, right and bottom of the target's object."""
    category: str


class KeypointPairs(Protocol):
    """Pairs, read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> KeypointPair: ...


class CorrespondenceBenchmark(Protocol):
    """The interface of a benchmark for `--protocol correspondence`."""

    @property
    def name(self) -> str: ...

    def pairs(self, split: str, /) -> KeypointPairs:
        """The pairs of "train", "val" or "test"; a UserError where there is no such split."""


class DepthBenchmark(Protocol):
    """The interface of a benchmark for `--protocol depth`."""

    @property
    def name(self) -> str: ...

    @property
    def depth_range(self) -> tuple[float, float]:
        """Nearest and farthest depth, both above 0."""

    @property
    def depth_unit(self) -> str: ...

    def depths(self, split: str, /) -> Examples:
        """Images (3, H, W) uint8 with depths (H, W) float32, NaN where none is to be scored."""
