"""Faster ways to the same numbers on a CPU."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.arithmetic import AT_ONCE, FAST_ON_CPU, LARGE, NARROW, Replaced, group_norm


def maps(*shape: int) -> Tensor:
    """Maps in channels_last, or tokens whose channels lie together."""
    x = (0.3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16()
    if len(shape) == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def weights(channels: int, dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(channels, generator=draws).to(dtype) for _ in range(2)]


SHAPES = {
    "small": (3, 64, 4, 6),
    "in parts": (AT_ONCE // (64 * 256) + 1, 64, 16, 16),
    "tokens": (2, 64, 35),
    "large": (2, 64, LARGE // 8, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_norm_and_its_gradients_are_those_of_float32(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = maps(*shape)
    inputs = [x, *weights(shape[1], dtype)]
    exact = [y.float().contiguous().requires_grad_() for y in inputs]
    for y in inputs:
        y.requires_grad_()

    mine, theirs = (
        group_norm(x, 16, *inputs[1:], 1e-3),
        F.group_norm(exact[0], 16, *exact[1:], 1e-3),
    )
    slope = maps(*shape).flip(0)
    mine.backward(slope)
    theirs.backward(slope.float())

    assert mine.dtype == torch.bfloat16
    assert mine.stride() == x.stride()
    assert torch.allclose(mine.float(), theirs, rtol=2**-8, atol=2**-8)
    for y, z in zip(inputs, exact, strict=True):
        assert y.grad is not None
        assert z.grad is not None
        assert y.grad.dtype == y.dtype
        assert (y.grad.float() - z.grad).norm() < 4e-3 * z.grad.norm()


def test_what_torch_is_fast_at_is_left_to_it() -> None:
    x, (weight, bias) = maps(2, 64, 4, 4), weights(64, torch.bfloat16)

    for y in (x.contiguous(), maps(2, 4 * NARROW, 4, 4), x[:, :, 0, 0], x[:0]):
        assert torch.equal(group_norm(y, 4, weight, bias), F.group_norm(y, 4, weight, bias))
    assert torch.equal(group_norm(x, 16), F.group_norm(x, 16))
    assert torch.equal(group_norm(x.float(), 16), F.group_norm(x.float(), 16))


def test_dividing_by_one_and_another_layout_make_no_copies() -> None:
    x = maps(2, 8, 4, 4)

    with Replaced(FAST_ON_CPU):
        assert x / 1.0 is x
        assert x.contiguous() is x
        assert torch.equal(x / 2.0, x * 0.5)
        assert x / torch.ones(1) is not x
        assert (x.long() / 1.0).dtype == torch.float32
        assert x.transpose(2, 3).contiguous().is_contiguous()
        assert x.contiguous(memory_format=torch.contiguous_format).is_contiguous()
