"""A diffusion model's noise schedule: how much of the image is left at each timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor

DENOISING = ("epsilon", "v_prediction", "sample")  # what a network predicts but in flow matching

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""Source of noise: one generator for a batch, one per image, or None for torch's default one."""


def draw_noise(x: Tensor, source: Randomness) -> Tensor:
    """Standard normal noise for x (B, ...), float32, drawn on the generators' own device.

    Raises:
        ValueError: the number of generators is not the number of images.
    """
    if isinstance(source, Sequence):
        if len(source) != len(x):
            raise ValueError(f"{len(source)} generators do not match {len(x)} images")
        each = [torch.randn(x.shape[1:], generator=one, device=one.device) for one in source]
        return torch.stack(each).to(x.device)
    device = x.device if source is None else source.device
    return torch.randn(x.shape, generator=source, device=device).to(x.device)


def ddpm_scheduler(
    beta_schedule: str, timesteps: int, prediction_type: str = "epsilon"
) -> DDPMScheduler:
    """The scheduler of DDPM (Ho et al. 2020), or of improved DDPM (Nichol and Dhariwal 2021).

    Args:
        beta_schedule: diffusers' name: `linear`, 1e-4 to 0.02 at 1000 timesteps and in proportion
            to 1000 / T at others (as in guided diffusion), or `squaredcos_cap_v2`, the cosine.
        timesteps: T.
        prediction_type: one of `DENOISING`.

    Raises:
        ValueError: too few timesteps; with 20, the last linear beta is 1 and leaves no signal.
    """
    least = 21 if beta_schedule == "linear" else 2
    if timesteps < least:
        raise ValueError(
            f"timesteps must be at least {least} for the schedule {beta_schedule}, got {timesteps}"
        )
    return DDPMScheduler(
        num_train_timesteps=timesteps,
        beta_start=1e-4 * 1000 / timesteps,
        beta_end=0.02 * 1000 / timesteps,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """The forward process x_t = signal_t x_0 + noise_t n of a model, n standard normal.

    Timesteps are indices 0..T-1 into this schedule, from little noise to much. Index 300 of two
    teachers means two noise levels, so tables compare `noise_fraction` or `log_snr`. Every method
    takes integer timesteps of any shape and returns float64 of that shape on the CPU.

    Attributes:
        signal: (T,) float64, the factor of the image.
        noise: (T,) float64, the factor of the noise.
        times: (T,) float64, the network's time input: the index itself, or T times the noise
            fraction in flow matching.
        prediction_type: what the network was trained to predict: "epsilon", "v_prediction",
            "sample", "flow", or "nothing" for a network that knows no timesteps.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        for table in (self.signal, self.noise, self.times):
            assert (table.dtype, table.shape) == (torch.float64, self.times.shape), table
        if not len(self) or not bool(((self.signal >= 0) & (self.noise >= 0)).all()):
            raise ValueError("the noise schedule is empty, or has negative factors")

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor, prediction_type: str) -> Self:
        """sqrt(abar) x_0 + sqrt(1 - abar) n (Ho et al. 2020, eq. 4). alphas_cumprod: (T,)."""
        alpha_bar = alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        if alpha_bar.numel() == 0 or not bool(((alpha_bar >= 0) & (alpha_bar <= 1)).all()):
            raise ValueError("the scheduler's alphas_cumprod is empty or leaves [0, 1]")
        return cls(
            signal=alpha_bar.sqrt(),
            noise=(1 - alpha_bar).sqrt(),
            times=torch.arange(len(alpha_bar), dtype=torch.float64),
            prediction_type=prediction_type,
        )

    @classmethod
    def flow(cls, sigmas: Tensor) -> Self:
        """(1 - s) x_0 + s n (Lipman et al. 2023; Esser et al. 2024). sigmas: (T,) s in [0, 1]."""
        fraction = sigmas.detach().to("cpu", torch.float64, copy=True).sort().values
        return cls(
            signal=1 - fraction,
            noise=fraction,
            times=fraction * len(fraction),
            prediction_type="flow",
        )

    @classmethod
    def without_noise(cls) -> Self:
        """The schedule of a network without timesteps: one index, 0, for the image itself."""
        one = torch.ones(1, dtype=torch.float64)
        return cls(signal=one, noise=0 * one, times=0 * one, prediction_type="nothing")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Self:
        """Read the training schedule (before a sampler thins it) from a diffusers scheduler.

        Raises:
            ValueError: it has neither `alphas_cumprod` nor flow matching's sigmas (such as EDM),
                flow sigmas only for sampling, continuous timesteps, or an unknown prediction type.
        """
        name = type(scheduler).__name__
        if name.startswith("FlowMatch"):
            return cls.flow(scheduler.sigmas[: scheduler.config["num_train_timesteps"]])
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"scheduler {name} has no alphas_cumprod; a teacher needs a variance-preserving "
                "schedule (such as DDPMScheduler's) or flow matching"
            )
        if scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"scheduler {name} only samples flow matching (use_flow_sigmas); give the one that "
                "the model was trained with, such as FlowMatchEulerDiscreteScheduler"
            )
        if scheduler.config.get("timestep_type") == "continuous":
            raise ValueError(
                f"scheduler {name} gives the network the logarithm of the noise (timestep_type "
                "continuous); a teacher needs one that gives it the timestep"
            )
        prediction_type = scheduler.config.get("prediction_type")
        if prediction_type not in DENOISING:
            raise ValueError(
                f"scheduler {name} has prediction_type {prediction_type!r}; it must be one of "
                f"{', '.join(DENOISING)}"
            )
        return cls.variance_preserving(alphas_cumprod, prediction_type)

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.times)

    @property
    def has_noise(self) -> bool:
        """Whether x_t has noise at any timestep."""
        return bool(self.noise.any())

    def check(self, timesteps: Tensor) -> None:
        """Check that timesteps index this schedule.

        Raises:
            ValueError: not an integer dtype, or a value outside 0..T-1.
        """
        if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers (int64), got {timesteps.dtype}")
        outside = timesteps[(timesteps < 0) | (timesteps >= len(self))]
        if outside.numel():
            raise ValueError(
                f"timestep {int(outside[0])} is outside 0..{len(self) - 1} of this noise schedule"
            )

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio signal^2 / noise^2 (Kingma et al. 2021, eq. 2), inf without noise.

        Raises:
            ValueError: a timestep outside 0..T-1; so do the methods below.
        """
        return (self._at(self.signal, timesteps) / self._at(self.noise, timesteps)).square()

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Natural logarithm of `snr`; -inf where the image is gone."""
        return self.snr(timesteps).log()

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Share of the image in the variance of x_t, SNR / (1 + SNR): the bar alpha_t of DDPM."""
        signal, noise = self._at(self.signal, timesteps), self._at(self.noise, timesteps)
        return signal.square() / (signal.square() + noise.square())

    def noise_fraction(self, timesteps: Tensor) -> Tensor:
        """The s in [0, 1] of the straight path (1 - s) x_0 + s n with the same ratio of both.

        This is flow matching's convention; teachers with different schedules compare by it.
        """
        signal, noise = self._at(self.signal, timesteps), self._at(self.noise, timesteps)
        return noise / (signal + noise)

    def nearest(self, noise_fraction: Tensor) -> Tensor:
        """The timesteps whose noise fraction is nearest. noise_fraction: any shape -> int64."""
        table = self.noise_fraction(torch.arange(len(self)))
        distance = (table - noise_fraction.cpu().double()[..., None]).abs()
        return distance.argmin(dim=-1)

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = signal_t x_0 + noise_t n.

        Args:
            images: (B, C, H, W) x_0, images in [-1, 1] or latents.
            noise: (B, C, H, W) standard normal.
            timesteps: (B,) integers in 0..T-1.
        """
        signal = self._at(self.signal, timesteps)[:, None, None, None]  # (B, 1, 1, 1)
        spread = self._at(self.noise, timesteps)[:, None, None, None]
        return signal.to(images) * images + spread.to(images) * noise

    def network_times(self, timesteps: Tensor) -> Tensor:
        """The network's time input (B,): int64 indices, or float32 times for flow matching."""
        times = self._at(self.times, timesteps)
        return times.float() if self.prediction_type == "flow" else times.long()

    def _at(self, table: Tensor, timesteps: Tensor) -> Tensor:
        timesteps = timesteps.cpu()
        self.check(timesteps)
        return table[timesteps.long()]
