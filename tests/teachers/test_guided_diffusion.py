"""Guided diffusion against computations of its own, and state dicts in the published layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from teachers.guided_diffusion import guided_diffusion, infer, noise_schedule
from teachers.guided_unet import GuidedUNet, split_heads

LAYERS = ("input_blocks.2", "middle_block", "output_blocks.1", "output_blocks.3")
TIMESTEPS = torch.tensor([0, 999, 250])
State = dict[str, Tensor]


@pytest.fixture
def state(guided: Any) -> State:
    state: State = guided.state(guided.shapes())
    return state


def images() -> Tensor:
    return torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(1))


def save(state: Any, folder: Path) -> str:
    torch.save(state, folder / "model.pt")
    return str(folder / "model.pt")


def teacher_of(state: Any, folder: Path, **options: Any) -> Any:
    settings = {"layers": LAYERS, "head_channels": 16} | options
    return guided_diffusion(save(state, folder), **settings)


# The network once more, on the tensors alone: widths 32 and 64, one block a level, attention at 64.


def convolve(s: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], **options)


def norm(s: State, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    spread = groups.var(dim=2, correction=0, keepdim=True) + 1e-5
    x = ((groups - groups.mean(dim=2, keepdim=True)) / spread.sqrt()).reshape(x.shape)
    return x * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def halve(x: Tensor) -> Tensor:
    corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).mean(0)


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def residual(s: State, name: str, x: Tensor, emb: Tensor, resample: Any = lambda x: x) -> Tensor:
    h = resample(swish(norm(s, f"{name}.in_layers.0", x)))
    h = convolve(s, f"{name}.in_layers.2", h, padding=1)
    weight, bias = s[f"{name}.emb_layers.1.weight"], s[f"{name}.emb_layers.1.bias"]
    signal = (swish(emb) @ weight.T + bias)[:, :, None, None]
    width = h.shape[1]
    if signal.shape[1] == width:
        h = norm(s, f"{name}.out_layers.0", h + signal)
    else:
        h = norm(s, f"{name}.out_layers.0", h) * (1 + signal[:, :width]) + signal[:, width:]
    h = convolve(s, f"{name}.out_layers.3", swish(h), padding=1)
    x = resample(x)
    if f"{name}.skip_connection.weight" in s:
        x = convolve(s, f"{name}.skip_connection", x)
    return x + h


def attend(s: State, name: str, x: Tensor, heads: int, new_order: bool) -> Tensor:
    """One head after the other, which takes its channels where the order says they are."""
    batch, channels = x.shape[:2]
    size = channels // heads
    flat = norm(s, f"{name}.norm", x).flatten(2)
    weight, bias = s[f"{name}.qkv.weight"][:, :, 0], s[f"{name}.qkv.bias"]
    qkv = torch.einsum("oc,bcn->bon", weight, flat) + bias[:, None]
    outputs = []
    for head in range(heads):
        if new_order:
            starts = [kind * channels + head * size for kind in range(3)]
        else:
            starts = [head * 3 * size + kind * size for kind in range(3)]
        q, k, v = (qkv[:, start : start + size] for start in starts)
        weights = (torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(size)).softmax(dim=2)
        outputs.append(torch.einsum("bnm,bcm->bcn", weights, v))
    weight, bias = s[f"{name}.proj_out.weight"][:, :, 0], s[f"{name}.proj_out.bias"]
    h = torch.einsum("oc,bcn->bon", weight, torch.cat(outputs, dim=1)) + bias[:, None]
    return x + h.reshape(batch, channels, *x.shape[2:])


def reference(s: State, x: Tensor, updown: bool, heads: int, new_order: bool) -> dict[str, Tensor]:
    frequencies = torch.tensor([10_000 ** (-i / 16) for i in range(16)])
    angles = TIMESTEPS[:, None] * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)  # cosines come first
    emb = emb @ s["time_embed.0.weight"].T + s["time_embed.0.bias"]
    emb = swish(emb) @ s["time_embed.2.weight"].T + s["time_embed.2.bias"]

    a = convolve(s, "input_blocks.0.0", x, padding=1)
    b = residual(s, "input_blocks.1.0", a, emb)
    if updown:
        c = residual(s, "input_blocks.2.0", b, emb, halve)
    else:
        c = convolve(s, "input_blocks.2.0.op", b, stride=2, padding=1)
    d = residual(s, "input_blocks.3.0", c, emb)
    d = attend(s, "input_blocks.3.1", d, heads, new_order)
    middle = residual(s, "middle_block.0", d, emb)
    middle = attend(s, "middle_block.1", middle, heads, new_order)
    middle = residual(s, "middle_block.2", middle, emb)
    h = residual(s, "output_blocks.0.0", torch.cat([middle, d], dim=1), emb)
    h = attend(s, "output_blocks.0.1", h, heads, new_order)
    h = residual(s, "output_blocks.1.0", torch.cat([h, c], dim=1), emb)
    h = attend(s, "output_blocks.1.1", h, heads, new_order)
    if updown:
        up = residual(s, "output_blocks.1.2", h, emb, double)
    else:
        up = convolve(s, "output_blocks.1.2.conv", double(h), padding=1)
    h = residual(s, "output_blocks.2.0", torch.cat([up, b], dim=1), emb)
    h = residual(s, "output_blocks.3.0", torch.cat([h, a], dim=1), emb)
    return dict(zip(LAYERS, (c, middle, up, h), strict=True))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("new_order", [False, True])
def test_features_equal_those_of_the_tensors_alone(
    guided, tmp_path, scale_shift, updown, new_order
):
    state = guided.state(guided.shapes(scale_shift=scale_shift, updown=updown))
    teacher = teacher_of(state, tmp_path, input="clean", new_attention_order=new_order)
    expected = reference(state, 2 * images() - 1, updown, 64 // 16, new_order)
    for name, feature in teacher.features(images(), TIMESTEPS).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-3, atol=1e-3)


def test_heads_can_be_given_by_their_number(state, tmp_path):
    teacher = teacher_of(state, tmp_path, input="clean", heads=2)
    expected = reference(state, 2 * images() - 1, True, 2, False)
    feature = teacher.features(images(), TIMESTEPS)["middle_block"]
    torch.testing.assert_close(feature, expected["middle_block"], rtol=1e-3, atol=1e-3)
    by_size = teacher_of(state, tmp_path, input="clean")
    assert not torch.allclose(feature, by_size.features(images(), TIMESTEPS)["middle_block"])
    assert by_size.fingerprint != teacher.fingerprint


def test_attention_orders_take_different_channels():
    qkv = torch.arange(12.0).reshape(1, 12, 1)  # two heads of two channels
    old = [x[0, :, 0].tolist() for x in split_heads(qkv, 2, new_order=False)]
    new = [x[0, :, 0].tolist() for x in split_heads(qkv, 2, new_order=True)]
    assert old == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert new == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_published_256x256_layout_is_understood(guided):
    """256x256_diffusion_uncond.pt has 552,814,086 parameters (552M in the paper's table 4)."""
    shapes = guided.shapes(
        widths=(256, 256, 512, 512, 1024, 1024), attention=(False,) * 3 + (True,) * 3, res_blocks=2
    )
    assert shapes["output_blocks.2.2.in_layers.0.weight"] == (1024,)
    with torch.device("meta"):
        network = GuidedUNet(infer(shapes))
    assert sum(weight.numel() for weight in network.parameters()) == 552_814_086


@pytest.mark.parametrize(
    "layout",
    [
        {"widths": (32,), "attention": (False,)},
        {"widths": (32, 32, 64), "attention": (True, False, True), "out_channels": 3},
        {"widths": (64, 32), "res_blocks": 3, "updown": False, "scale_shift": False},
    ],
)
def test_other_layouts_are_understood(guided, layout):
    shapes = guided.shapes(**layout)
    with torch.device("meta"):
        state = GuidedUNet(replace(infer(shapes), head_channels=16)).state_dict()
    assert {name: tuple(weight.shape) for name, weight in state.items()} == shapes


def test_pt_and_safetensors_and_half_precision_give_a_float32_teacher(state, tmp_path):
    halves = {name: weight.half() for name, weight in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    settings = {"layers": LAYERS, "head_channels": 16}
    first = guided_diffusion(str(tmp_path / "model.safetensors"), **settings)
    second = teacher_of(halves, tmp_path)
    assert first.fingerprint == second.fingerprint
    assert {weight.dtype for weight in first.network.parameters()} == {torch.float32}
    assert first.name == "model"
    wrapped = {f"module.{name}": weight for name, weight in state.items()}
    assert teacher_of(wrapped, tmp_path).fingerprint == teacher_of(state, tmp_path).fingerprint


def test_images_of_any_even_size_will_do(state, tmp_path):
    teacher = teacher_of(state, tmp_path)
    x = torch.rand((1, 3, 10, 24), generator=torch.Generator().manual_seed(2))
    shapes = [x.shape[1:] for x in teacher.features(x, TIMESTEPS[:1]).values()]
    assert shapes == [(32, 5, 12), (64, 5, 12), (64, 10, 24), (32, 10, 24)]
    with pytest.raises(ValueError, match=r"11x24 does not suit this teacher: both .* by 2; try"):
        teacher.layer_table((11, 24))


def test_linear_schedule_is_that_of_ddpm_at_1000_steps_and_stretched_at_others():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = noise_schedule("linear", 1000)
    expected = (1 - betas).cumprod(0)
    alpha_bar = schedule.alpha_bar(torch.arange(1000))
    torch.testing.assert_close(alpha_bar, expected, rtol=1e-6, atol=1e-6)  # diffusers: float32
    short = noise_schedule("linear", 100).alpha_bar(torch.tensor([0, 98, 99]))
    assert short[0].item() == pytest.approx(1 - 0.001)  # ten of the long one's steps in one
    assert (short[2] / short[1]).item() == pytest.approx(1 - 0.2)
    assert schedule.prediction_type == "epsilon"


def test_cosine_schedule_is_the_papers():
    schedule = noise_schedule("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 500, 1000)]
    alpha_bar = schedule.alpha_bar(torch.tensor([0, 499, 998, 999])).tolist()
    assert alpha_bar[0] == pytest.approx(f[1] / f[0])  # index 0 is the paper's t = 1
    assert alpha_bar[1] == pytest.approx(f[2] / f[0])
    assert alpha_bar[3] == pytest.approx(alpha_bar[2] * 0.001)  # beta is clipped at 0.999


def test_schedule_is_part_of_the_fingerprint(state, tmp_path):
    teachers = [
        teacher_of(state, tmp_path, **options)
        for options in ({}, {"schedule": "cosine"}, {"timesteps": 500})
    ]
    assert len({teacher.fingerprint for teacher in teachers}) == 3
    assert len(teachers[2].noise_schedule) == 500


def test_a_rescaled_index_is_told_in_thousandths_of_the_schedule(state, tmp_path):
    """As improved diffusion trained its models of 4,000 steps."""
    images = torch.rand(2, 3, 16, 16)
    plain = teacher_of(state, tmp_path, input="clean")
    rescaled = teacher_of(state, tmp_path, input="clean", timesteps=4000, rescale_timesteps=True)
    longer = teacher_of(state, tmp_path, input="clean", timesteps=4000)
    at, four = torch.tensor([3, 500]), torch.tensor([12, 2000])
    for name, feature in plain.features(images, at).items():
        torch.testing.assert_close(rescaled.features(images, four)[name], feature)
        assert not torch.allclose(longer.features(images, four)[name], feature)
    assert longer.fingerprint != rescaled.fingerprint


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"schedule": "sigmoid"}, "unknown schedule 'sigmoid'; choose from linear, cosine"),
        ({"timesteps": 20}, "timesteps must be at least 21 for the schedule linear, got 20"),
        ({"head_channels": 48}, r"model\.pt: head_channels 48 does not divide the 64 channels"),
        ({"head_channels": 0}, "head_channels 0 does not divide the 64 channels"),
        ({"heads": 3}, "heads 3 does not divide the 64 channels"),
    ],
)
def test_options_that_do_not_fit_are_named(state, tmp_path, options, pattern):
    with pytest.raises(ValueError, match=pattern):
        teacher_of(state, tmp_path, **options)


def test_conditional_and_foreign_networks_are_refused(state, guided, tmp_path):
    def refused(pattern: str, state: Any) -> None:
        with pytest.raises(ValueError, match=pattern) as caught:
            teacher_of(state, tmp_path)
        assert "\n" not in str(caught.value)

    refused("class-conditional", state | {"label_emb.weight": torch.zeros(1000, 128)})
    encoder = {name: x for name, x in state.items() if not name.startswith("output_blocks")}
    refused("1 levels with 0 output_blocks .*classifier has no output_blocks", encoder)
    refused("1 levels with 0 output_blocks", {"conv_in.weight": torch.zeros(8, 3, 3, 3)})
    refused(
        "turns 6 channels into 6; a teacher needs 3",
        state | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
    )
    refused(
        r"channels must be multiples of 32, got \(16, 32\)", guided.state(guided.shapes((16, 32)))
    )
    pooled = {name: x for name, x in state.items() if not name.startswith("input_blocks.2.")}
    refused(r"input_blocks\.2 has no weights; .* \(conv_resample=False\) are not", pooled)
    refused("is not a state dict; save only the weights", {"step": 3, "model": state})


def test_tensors_that_differ_are_named_with_both_shapes(state, tmp_path):
    del state["middle_block.1.norm.bias"]
    state["out.0.bias"] = torch.zeros(31)
    state["stranger"] = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"model\.pt: not a guided-diffusion UNet: 3 tensors differ"
    ) as caught:
        teacher_of(state, tmp_path)
    message = str(caught.value)
    assert "middle_block.1.norm.bias is missing, not (64,)" in message
    assert "out.0.bias is (31,), not (32,)" in message
    assert "stranger is (2, 3), not expected at all" in message


def test_weights_that_are_not_finite_are_named(state, tmp_path):
    state["out.0.bias"][3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.pt: out\.0\.bias has values that are not fin"):
        teacher_of(state, tmp_path)


def test_damaged_missing_and_dangerous_files_are_refused(state, tmp_path):
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    def refused(kind: type[Exception], pattern: str, path: str) -> None:
        with pytest.raises(kind, match=pattern) as caught:
            guided_diffusion(path, layers=LAYERS)
        assert "\n" not in str(caught.value)

    path = save({"weight": Touch()}, tmp_path)
    refused(ValueError, "is damaged or contains more than tensors", path)
    assert not (tmp_path / "ran").exists()
    for wrong in ({3: torch.zeros(1)}, {"weight": torch.zeros(2, 2).to_sparse()}):
        refused(ValueError, "is not a state dict; save only the weights", save(wrong, tmp_path))
    whole = Path(save(state, tmp_path)).read_bytes()
    for kept in (0, 100, len(whole) // 2):
        for name in ("short.pt", "short.safetensors"):
            (tmp_path / name).write_bytes(whole[:kept])
            refused(ValueError, rf"{name} is damaged", str(tmp_path / name))
    refused(FileNotFoundError, "there is no file .*gone.pt; give the state", "gone.pt")
