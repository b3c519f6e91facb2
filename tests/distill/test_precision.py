"""Forward passes in bfloat16, and what of them stays in float32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill import precision
from distill.config import RunConfig, TrainConfig
from distill.precision import HEAVY, LONG, autocast, resolve_precision
from distill.recipe import first_difference
from distill.teacher import build_teacher
from distill.teacher_config import TeacherTrainConfig

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


def test_students_may_rely_on_layouts_and_write_into_quotients() -> None:
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with autocast(CPU, "bf16"):
        assert x.contiguous().view(2, -1).shape == (2, 48)
        (x / 1.0).add_(1)
    assert bool((x == 1).all())


def test_without_low_precision_nothing_is_changed() -> None:
    x = torch.randn(4, 4, requires_grad=True)

    with autocast(CPU, "no"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (3, (2, 1), (0, 1))]
)
def test_convolutions_of_small_maps_are_products(
    kernel: int, stride: int, padding: int | tuple[int, int]
) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 3, 4, generator=draws, requires_grad=True)
    weight = 0.1 * torch.randn(256, 256, kernel, kernel, generator=draws)
    bias = torch.randn(256, generator=draws)
    assert weight.numel() >= HEAVY * x.numel()
    inputs = [x, weight.requires_grad_(), bias.requires_grad_()]

    exact = F.conv2d(*inputs, stride=stride, padding=padding)
    slope = torch.randn(exact.shape, generator=draws)
    theirs = torch.autograd.grad(exact, inputs, slope)
    with autocast(CPU, "bf16"):
        trained = F.conv2d(*inputs, stride=stride, padding=padding)
    mine = torch.autograd.grad(trained, inputs, slope.bfloat16())

    assert trained.dtype == torch.bfloat16
    assert trained.is_contiguous(memory_format=torch.channels_last)
    assert trained.grad_fn is not None
    assert "Convolution" not in trained.grad_fn.name()
    assert (trained - exact).norm() < 1e-2 * exact.norm()
    for ours, true in zip(mine, theirs, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - true).norm() < 1e-2 * true.norm()


@pytest.mark.parametrize("case", ["large map", "groups", "dilation", "same", "looked at"])
def test_other_convolutions_are_left_to_torch(case: str) -> None:
    x = torch.randn(1, 32, *((40, 40) if case == "large map" else (2, 2)))
    groups, dilation = 32 if case == "groups" else 1, 2 if case == "dilation" else 1
    padding = "same" if case == "same" else dilation
    weight = torch.randn(32 * 32, 32 // groups, 3, 3, requires_grad=case != "looked at")

    def convolved() -> Tensor:
        return F.conv2d(x, weight, None, 1, padding, dilation, groups)

    with torch.set_grad_enabled(case != "looked at"):
        with autocast(CPU, "bf16"):
            mine = convolved()
        with torch.autocast("cpu", torch.bfloat16):
            theirs = convolved()

    assert torch.equal(mine, theirs)
    assert type(mine.grad_fn) is type(theirs.grad_fn)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_the_default_where_the_machine_computes_it(
    load: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda kind: fast)

    weight = next(build_teacher(load("teacher.dtype=auto")).parts.parameters())  # type: ignore[attr-defined]
    assert weight.dtype == (torch.bfloat16 if fast else torch.float32)
    for config in (TrainConfig(), TeacherTrainConfig()):
        assert resolve_precision(config.precision, "cpu") == ("bf16" if fast else "no")
        with autocast(CPU, config.precision):
            assert torch.is_autocast_enabled("cpu") == fast


def test_a_run_may_go_on_where_another_precision_is_fast(load: Callable[..., RunConfig]) -> None:
    chosen = load("teacher.dtype=bfloat16", "train.precision=bf16")
    left = load("teacher.dtype=auto", "train.precision=auto")
    assert first_difference(chosen, left) is None
    difference = first_difference(left, chosen)
    assert difference == ("teacher.dtype", "auto", "bfloat16")


@pytest.mark.parametrize(
    ("kernels", "able", "expected"),
    [
        (True, {"avx512_bf16": True}, True),
        (True, {"avx512_f": True, "amx_bf16": False}, False),  # oneDNN would imitate it
        (True, {"bf16": True}, True),
        (False, {"bf16": True}, False),  # torch for macOS has no oneDNN
        (True, None, True),
    ],
)
def test_a_cpu_computes_bfloat16_with_instructions_of_its_own(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, able: dict[str, bool] | None, expected: bool
) -> None:
    name = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: kernels, raising=False)
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)

    assert precision.computes_bfloat16.__wrapped__("cpu") is expected


def test_bfloat16_that_is_imitated_is_told_once(
    load: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda kind: False)
    precision.warn_if_slow.cache_clear()

    for _ in range(2):
        build_teacher(load("teacher.dtype=bfloat16"))
        with autocast(CPU, "bf16"):
            pass
        build_teacher(load("teacher.dtype=float32"))

    assert capsys.readouterr().err.splitlines() == [
        "teacher.dtype=bfloat16: this CPU has no bfloat16 instructions; teacher.dtype=float32 is "
        "many times as fast",
        "precision=bf16: this CPU has no bfloat16 instructions; precision=no is many times as fast",
    ]
    precision.warn_if_slow.cache_clear()
