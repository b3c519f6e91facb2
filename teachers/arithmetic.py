"""Faster replacements for torch functions that are slow on 16-bit channels_last maps on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEATURES = 1
"""Version of the teachers' features. Raise it when a change here or in a family alters them, so
that stored features are not mistaken for new ones."""
NARROW = 16
"""Channels per group from which torch's group normalisation is fast."""
LARGE = 1024
"""Positions per map from which its forward pass is fast."""
AT_ONCE = 2**19
"""Numbers normalised at once: as float32 they fit into the cache of a core."""


class Replaced(TorchFunctionMode):
    """A mode that runs unchanged networks with some of torch's functions replaced.

    Args:
        table: from each replaced function to the one called in its place, with equal arguments.
    """

    def __init__(self, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def divided(x: Tensor, divisor: object, **options: Any) -> Tensor:
    """`Tensor.div` that returns x for x / 1, as diffusers divides maps by factors of 1."""
    if isinstance(divisor, float) and divisor == 1 and x.is_floating_point() and not options:
        return x
    return Tensor.div(x, divisor, **options)  # type: ignore[arg-type]


def contiguous(x: Tensor, **options: Any) -> Tensor:
    """`Tensor.contiguous` that accepts channels_last as contiguous: diffusers calls it before a
    convolution, and all later maps would change their layout."""
    if x.ndim == 4 and not options and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return Tensor.contiguous(x, **options)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.group_norm`, the result in the layout of x.

    Args:
        x: (B, C, H, W), or the (B, C, N) of an attention layer's tokens.
    """
    if (
        x.dtype != torch.bfloat16
        or x.ndim not in (3, 4)
        or x.shape[1] // num_groups >= NARROW
        or weight is None
        or bias is None
        or not _positions(x).is_contiguous()
        or torch.compiler.is_compiling()
    ):
        return F.group_norm(x, num_groups, weight, bias, eps)
    found: Tensor = _GroupNorm.apply(x, num_groups, weight, bias, eps)
    return found


def _positions(x: Tensor) -> Tensor:
    """A map (B, C, H, W) or (B, C, N) as (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


class _GroupNorm(torch.autograd.Function):
    """Group normalisation (Wu and He 2018), some images at a time, computed in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        last = _positions(x)
        size, positions, channels = last.shape
        ctx.groups = groups
        if x.ndim == 4 and positions >= LARGE:
            out, mean, inverse = torch.native_group_norm(
                x, weight, bias, size, channels, positions, groups, eps
            )
            ctx.save_for_backward(x, weight, mean.float(), inverse.float())
            return out
        out, mean, inverse = torch.empty_like(last), *torch.empty(2, size, groups).unbind()
        w, b = weight.float().view(groups, -1), bias.float().view(groups, -1)
        for x_, out_, mean_, inverse_ in _some(last, out, mean, inverse):
            x_ = x_.float()
            sums = torch.stack((x_.sum(dim=1), (x_ * x_).sum(dim=1)))
            moments = sums.view(*sums.shape[:2], groups, -1).mean(dim=3) / positions
            mean_.copy_(moments[0])
            inverse_.copy_((moments[1] - mean_.square()).clamp_min(0).add(eps).rsqrt())
            scale = inverse_[..., None] * w
            shift = b - mean_[..., None] * scale
            out_.copy_(torch.addcmul(_each(shift), x_, _each(scale)))
        ctx.save_for_backward(x, weight, mean, inverse)
        return out.transpose(1, 2).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        last, groups = _positions(x), ctx.groups
        w = weight.float().view(groups, -1)
        of_x, of_weight, of_bias = torch.empty_like(last), torch.zeros_like(w), torch.zeros_like(w)
        numbers = last.shape[1] * w.shape[1]  # of a group
        parts = _some(last, _positions(gradient), of_x, mean[..., None], inverse[..., None])
        for x_, dy, of_x_, mean_, inverse_ in parts:
            x_, dy = x_.float(), dy.float()
            # sums over positions: of dy, and of dy times the normalised x
            sums = [s.sum(dim=1).view(len(s), groups, -1) for s in (dy, dy * x_)]
            sums[1] = (sums[1] - mean_ * sums[0]) * inverse_
            of_bias += sums[0].sum(dim=0)
            of_weight += sums[1].sum(dim=0)
            level, slope = ((w * s).sum(dim=2, keepdim=True) / numbers for s in sums)
            # dx = inverse (w dy - level - slope (x - mean) inverse)
            steep = -slope * inverse_.square()
            shift = (-level * inverse_ - steep * mean_).expand(-1, -1, w.shape[1])
            rest = torch.addcmul(_each(shift), x_, _each(steep.expand_as(shift)))
            of_x_.copy_(torch.addcmul(rest, dy, _each(inverse_ * w)))
        of_input = of_x.transpose(1, 2).view(x.shape)
        return of_input, None, of_weight.flatten().to(weight), of_bias.flatten().to(weight), None


def _some(last: Tensor, *others: Tensor) -> zip[tuple[Tensor, ...]]:
    """Split tensors (B, ...) into parts of as many images as fit the cache (by the first's
    size)."""
    images = max(1, AT_ONCE // last[0].numel())
    return zip(*(torch.split(x, images) for x in (last, *others)), strict=True)


def _each(x: Tensor) -> Tensor:
    """(B, groups, channels of one) -> (B, 1, C)."""
    return x.flatten(1)[:, None]


FAST_ON_CPU: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.group_norm: group_norm,
    Tensor.div: divided,
    Tensor.contiguous: contiguous,
}
"""Table of `Replaced` for 16-bit channels_last diffusion networks. Division and `contiguous` are
for these alone: other modules may write into a quotient, or rely on the layout that they got."""
