"""What a training step sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The images of a step."""

    labelled: Tensor
    """(L, 3, H, W) in [0, 1]."""
    targets: Tensor
    """Their classes (L,) or masks (L, H, W), int64, or landmarks (L, K, 2) float32."""
    unlabelled: Tensor | None = None
    """(U, 3, H, W)."""
    tags: Tensor | None = None
    """(L + U, 3) of all these images (`data.Tagged`), on the CPU; needed where there is a cache."""
    positions: Tensor | None = None
    """(L,) int64, which of the run's labelled images each is; by it a policy's rewards find their
    image's baseline."""

    @property
    def images(self) -> Tensor:
        """All of them, (L + U, 3, H, W), the labelled ones first."""
        if self.unlabelled is None:
            return self.labelled
        return torch.cat([self.labelled, self.unlabelled])

    def micro_batches(self, count: int) -> Iterator[Batch]:
        """Equal parts for gradient accumulation, each with its share of labelled images."""
        nothing: list[Any] = [None] * count
        unlabelled = nothing if self.unlabelled is None else self.unlabelled.chunk(count)
        tags = nothing
        if self.tags is not None:
            first, rest = self.tags.tensor_split([len(self.labelled)])
            pairs = zip(first.tensor_split(count), rest.tensor_split(count), strict=True)
            tags = [torch.cat(pair) for pair in pairs]
        positions = nothing if self.positions is None else self.positions.chunk(count)
        labelled = self.labelled.chunk(count), self.targets.chunk(count)
        return map(Batch, *labelled, unlabelled, tags, positions)
