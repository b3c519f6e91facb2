"""A diffusion model's noise schedule: how much of the image is left at each timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """The variance-preserving forward process of Ho et al. 2020, "Denoising Diffusion ...".

    Timesteps are indices into this one schedule: index 300 of two teachers is two different noise
    levels, so tables compare `noise_fraction` or `log_snr`. Every method takes integer timesteps of
    any shape and answers float64 of that shape on the CPU, where the 8 kB table lies.

    Attributes:
        alphas_cumprod: (T,) float64 in [0, 1], the paper's bar alpha_t.
        prediction_type: what the network was trained to predict: "epsilon", "v_prediction" or
            "sample".
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        assert (table.dtype, table.ndim) == (torch.float64, 1), (table.dtype, table.shape)
        if len(table) == 0 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("the scheduler's alphas_cumprod is empty or leaves [0, 1]")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Self:
        """Read the schedule off a diffusers scheduler.

        Raises:
            ValueError: it has no `alphas_cumprod` (flow matching, EDM) or no prediction type.
        """
        name = type(scheduler).__name__
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"scheduler {name} has no alphas_cumprod; a teacher needs a variance-preserving "
                "schedule such as DDPMScheduler's"
            )
        prediction_type = scheduler.config.get("prediction_type")
        if prediction_type is None:
            raise ValueError(f"scheduler {name} has no prediction_type in its config")
        table = alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        return cls(alphas_cumprod=table, prediction_type=prediction_type)

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def check(self, timesteps: Tensor) -> None:
        """Refuse what does not index this schedule.

        Raises:
            ValueError: not an integer dtype, or a value outside 0..T-1.
        """
        if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps are {timesteps.dtype}; they must be integers (int64)")
        outside = timesteps[(timesteps < 0) | (timesteps >= len(self))]
        if outside.numel():
            raise ValueError(
                f"timestep {int(outside[0])} is outside 0..{len(self) - 1} of this noise schedule"
            )

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Share of the image's variance left in x_t. Raises ValueError outside 0..T-1."""
        timesteps = timesteps.cpu()
        self.check(timesteps)
        return self.alphas_cumprod[timesteps.long()]

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) (Kingma et al. 2021, eq. 2), inf at abar 1."""
        alpha_bar = self.alpha_bar(timesteps)
        return alpha_bar / (1 - alpha_bar)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Natural logarithm of `snr`; -inf where nothing is left of the image."""
        return self.snr(timesteps).log()

    def noise_fraction(self, timesteps: Tensor) -> Tensor:
        """The s in [0, 1] of the straight path (1 - s) x_0 + s n with the same ratio of both.

        The convention of flow matching, so that teachers with different schedules compare:
        s = sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar)).
        """
        alpha_bar = self.alpha_bar(timesteps)
        return (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n (Ho et al. 2020, eq. 4).

        Args:
            images: (B, C, H, W) x_0 in [-1, 1].
            noise: (B, C, H, W) standard normal.
            timesteps: (B,) integers in 0..T-1.
        """
        alpha_bar = self.alpha_bar(timesteps)[:, None, None, None]  # (B, 1, 1, 1)
        return alpha_bar.sqrt().to(images) * images + (1 - alpha_bar).sqrt().to(images) * noise
