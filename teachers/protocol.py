"""What the distillation loop needs of a teacher, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from teachers.noise import NoiseSchedule, Randomness


class Teacher(Protocol):
    """A frozen network with one feature map per layer and timestep.

    It is in eval mode, has no gradients, and belongs to no `state_dict`: a checkpoint refers to it
    by its `fingerprint`.
    """

    @property
    def name(self) -> str:
        """For tables and logs."""
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
        """SHA-256 of weights and configs: of the network, not of how it is asked to look."""
        ...

    def features(
        self,
        images: Tensor,
        timesteps: Tensor,
        generator: Randomness = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The asked layers' maps, float32 (B, C, h, w) each, without gradient.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1], on the teacher's device.
            timesteps: (B,) int64 in 0..T-1, any mix; on the CPU they cost no synchronisation.
            generator: source of the noise, or one for each image; None takes torch's default one.
            labels: (B,) int64 classes, for a teacher with a condition a class; negative where an
                image has none, and None for all. Given in training alone.

        Raises:
            ValueError: a timestep outside 0..T-1, or images of a shape that it cannot take.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        ...
