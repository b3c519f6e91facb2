"""Forward passes in bfloat16, and what of them stays in float32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.precision import LONG, autocast

CPU = torch.device("cpu")


def qkv(keys: int = 16) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, length, 8, generator=draws).bfloat16().requires_grad_()
        for length in (16, keys, keys)
    ]


def exact(tensors: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*(x.float() for x in tensors)).bfloat16()


def test_short_attention_is_computed_in_float32_where_it_is_trained() -> None:
    tensors = qkv()

    with autocast(CPU, "bf16"):
        trained = F.scaled_dot_product_attention(*tensors)
        product = tensors[0] @ tensors[1].transpose(-2, -1)
        with torch.no_grad():
            looked = F.scaled_dot_product_attention(*tensors)

    assert trained.dtype == product.dtype == looked.dtype == torch.bfloat16
    assert torch.equal(trained, exact(tensors))
    assert not torch.equal(looked, exact(tensors))
    trained.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in tensors)


@pytest.mark.parametrize("case", ["long", "masked"])
def test_long_and_masked_attention_is_left_to_torch(case: str) -> None:
    tensors = qkv(LONG if case == "long" else 16)
    mask = torch.zeros(16, 16, dtype=torch.bfloat16) if case == "masked" else None

    with autocast(CPU, "bf16"):
        mine = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.scaled_dot_product_attention(*tensors, attn_mask=mask)

    assert torch.equal(mine, theirs)


def test_without_low_precision_nothing_is_changed() -> None:
    x = torch.randn(4, 4, requires_grad=True)

    with autocast(CPU, "no"):
        assert (x @ x).dtype == torch.float32
