"""The part of a teacher that the distillation loop uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from teachers.noise import NoiseSchedule, Randomness


class Teacher(Protocol):
    """A frozen network with one feature map per layer and timestep.

    It is in eval mode, has no gradients, and is in no `state_dict`: checkpoints refer to it by its
    `fingerprint`.
    """

    @property
    def name(self) -> str:
        """Name for tables and logs."""
        ...

    @property
    def layers(self) -> Sequence[str]:
        """The layers that `features` returns, in that order; the library's own module names."""
        ...

    @property
    def channels(self) -> Mapping[str, int]:
        """C of each layer's map."""
        ...

    @property
    def reductions(self) -> Mapping[str, int]:
        """Side of the image over the side of each layer's map."""
        ...

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the timesteps index."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the network's weights and configs, but not of how it looks at images."""
        ...

    def features(
        self,
        images: Tensor,
        timesteps: Tensor,
        generator: Randomness = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The requested layers' maps, float32 (B, C, h, w) each, without gradient.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1], on the teacher's device.
            timesteps: (B,) int64 in 0..T-1, any mix; on the CPU they cost no synchronisation.
            generator: source of the noise, or one per image; None uses torch's default one.
            labels: (B,) int64 classes for a class-conditional teacher; negative for an image
                without one, or None for all. Only given in training.

        Raises:
            ValueError: a timestep outside 0..T-1, or images of an unsuitable shape.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        ...
