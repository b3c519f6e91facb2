"""The arithmetic of forward passes that are trained."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn import functional as F

from teachers.arithmetic import Replaced, group_norm

Precision = Literal["auto", "bf16", "no"]
LONG = 512
"""Number of keys from which attention trains faster in bfloat16 on a CPU with AMX."""
HEAVY = 8
"""Weights per input value from which a convolution trains faster as a matrix product."""


@functools.cache
def computes_bfloat16(kind: str) -> bool:
    """Whether the `cuda` or `cpu` device here has bfloat16 instructions.

    Without them bfloat16 is emulated, on a CPU up to a hundred times slower than float32.
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch's own kernels, where it was built without oneDNN's, are slow whatever the CPU
    kernels: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    able = getattr(torch.cpu, "get_capabilities", lambda: None)()  # not in every version of torch
    names = ("avx512_bf16", "amx_bf16", "bf16")
    return kernels() and (able is None or any(able.get(name) for name in names))


def resolve_dtype(dtype: str, kind: str) -> str:
    """The name of the dtype that `teacher.dtype` asks for on a kind of device, `cuda` or `cpu`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if computes_bfloat16(kind) else "float32"


def resolve_precision(precision: Precision, kind: str) -> Literal["bf16", "no"]:
    """What `precision` asks for on a kind of device, `cuda` or `cpu`."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bfloat16(kind) else "no"


@functools.cache
def warn_if_slow(asked: str, instead: str, kind: str) -> None:
    """Warn once if a recipe asks for bfloat16 where it is emulated.

    Args:
        asked, instead: `key=value`, as requested and as recommended.
        kind: `cuda` or `cpu`.
    """
    if not computes_bfloat16(kind):
        what = "GPU" if kind == "cuda" else "CPU"
        print(
            f"{asked}: this {what} has no bfloat16 instructions; {instead} is many times as fast",
            file=sys.stderr,
        )


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute forward passes in `precision`, with faster replacements where torch is slow on a
    CPU."""
    low = resolve_precision(precision, device.type) == "bf16"
    if precision == "bf16":
        warn_if_slow("precision=bf16", "precision=no", device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        if low and device.type == "cpu":
            with Replaced(INSTEAD):
                yield
        else:
            yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, in float32 for few keys if gradients are needed.

    torch's backward pass is slower in bfloat16, several times so with few channels per head. Calls
    with masks, whose dtype is the query's, are left to torch.
    """
    if attn_mask is not None or key.shape[-2] >= LONG or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kw)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), None, *args, **kw
        )
    return wide.to(query.dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d`, for small maps as the product of unfolded positions with the weights.

    There torch spends most of its time on reordering the weights, above all in the backward pass.
    """
    light = weight.numel() < HEAVY * x.numel() or not torch.is_grad_enabled()
    dilated = max(to_2tuple(dilation)) > 1
    if light or dilated or x.ndim < 4 or isinstance(padding, str) or groups > 1:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    (high, wide), (down, across), steps = weight.shape[2:], to_2tuple(padding), to_2tuple(stride)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, across, across, down, down))
    windows = padded.unfold(1, high, steps[0]).unfold(2, wide, steps[1])  # (B, H, W, C, h, w)
    positions = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
    return F.linear(positions, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


INSTEAD: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.group_norm: group_norm,
    F.scaled_dot_product_attention: _attention,
    F.conv2d: _convolution,
}
