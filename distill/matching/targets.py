"""What the policy chose for the images of a step, and what the teacher shows of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rl_policy.protocol import MixingPolicy, TimestepPolicy
from teachers.protocol import Teacher


class Choice(NamedTuple):
    """For each of B images."""

    bins: Tensor
    """(B,) int64; of a mixture the one nearest to its mean timestep."""
    timesteps: Tensor
    """(B,) int64, those of the bins; of a mixture its mean, rounded."""
    weights: Tensor | None = None
    """(B, K) float32, of a mixture."""

    def to(self, device: torch.device) -> Choice:
        """On the device; there the weights collect a gradient."""
        weights = self.weights
        if weights is not None:
            weights = weights.to(device).detach().requires_grad_()
        bins, timesteps = (x.to(device, non_blocking=True) for x in (self.bins, self.timesteps))
        return Choice(bins, timesteps, weights)


class FeatureTargets(NamedTuple):
    """What the teacher shows for one batch."""

    choice: Choice
    """Of the policy, on the device."""
    maps: Mapping[str, Tensor]
    """Teacher layer -> (B, C, h, w); of a mixture with a gradient to its weights."""
    redrawn: Mapping[str, Tensor] | None = None
    """The same under another draw of the noise, in steps that measure the target-noise floor."""


def choose(
    policy: TimestepPolicy | MixingPolicy,
    timesteps: Tensor,
    context: Tensor,
    generator: Generator,
    progress: float,
) -> Choice:
    """Ask the policy.

    Args:
        policy: One or the other.
        timesteps: (K,) int64, what its bins stand for.
        context: (B, D) float32, what it sees.
        generator: Source of the choice's randomness, on the CPU.
        progress: Share of the policy's steps that are done.

    Raises:
        ValueError: It answers something else than its protocol says.
    """
    images, count = len(context), len(timesteps)
    if not isinstance(policy, MixingPolicy):
        bins = policy.act(context, generator, progress)
        _check(bins, "act", (images,), torch.int64)
        if len(wrong := bins[(bins < 0) | (bins >= count)]):
            raise ValueError(f"act chose bin {int(wrong[0])} of 0 to {count - 1}")
        return Choice(bins, timesteps[bins])
    weights = policy.mix(context, progress)
    _check(weights, "mix", (images, count), torch.float32)
    mean = (weights @ timesteps.float()).round().long()
    return Choice((mean[:, None] - timesteps).abs().argmin(dim=1), mean, weights)


def check_probabilities(policy: TimestepPolicy | MixingPolicy, context: Tensor, count: int) -> None:
    """Raises ValueError where the distribution of a policy over its `count` bins is none.

    Args:
        context: (B, D) float32, what it sees.
    """
    found = policy.probabilities(context)
    _check(found, "probabilities", (len(context), count), torch.float32)
    if not bool(found.isfinite().all()):
        raise ValueError("probabilities returned numbers that are not finite")


def _check(found: object, method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless a policy's method answered a tensor of that kind."""
    if isinstance(found, Tensor) and found.shape == shape and found.dtype == dtype:
        return
    kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else repr(found)
    raise ValueError(f"{method} must return a tensor {shape} of {dtype}, not {kind:.80}")


def check_maps(teacher: Teacher, maps: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are a teacher's maps of one image, as it says they are."""
    for layer in teacher.layers:
        x, channels = maps.get(layer), teacher.channels[layer]
        if x is None or x.ndim != 4 or x.shape[:2] != (1, channels):
            kind = "nothing" if x is None else tuple(x.shape)
            raise ValueError(
                f"{teacher.name} gives {kind} for layer {layer!r}, not a map (1, {channels}, h, w)"
            )


def mixture(weights: Tensor, at: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of a teacher's maps at all bins, with a gradient to the weights.

    Args:
        weights: (B, K) float32, rows that sum to 1.
        at: From a bin an image, (B,) int64 on the CPU, to maps by layer, (B, C, h, w).
    """
    mixed: dict[str, Tensor] = {}
    for index, weight in enumerate(weights.T):
        for layer, x in at(torch.full((len(weights),), index)).items():
            part = weight[:, None, None, None] * x
            mixed[layer] = mixed[layer] + part if layer in mixed else part
    return mixed
