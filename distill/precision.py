"""The arithmetic of forward passes that are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LONG = 512
"""Keys from which attention trains faster in bfloat16 than in float32 on a CPU with AMX."""


@contextmanager
def autocast(device: torch.device, precision: Literal["bf16", "no"]) -> Iterator[None]:
    """Forward passes compute in `precision` under it; on a CPU short attention in float32."""
    low = precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        if low and device.type == "cpu":
            with _ShortAttention():
                yield
        else:
            yield


class _ShortAttention(TorchFunctionMode):
    """Attention over few keys in float32 where gradients are asked for.

    On a CPU torch's backward pass in bfloat16 takes longer, with few channels a head several times.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
            func = _attention
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`; masks, whose type is the query's, are left to it."""
    if attn_mask is not None or key.shape[-2] >= LONG:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kw)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), None, *args, **kw
        )
    return wide.to(query.dtype)
