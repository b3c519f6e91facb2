"""What is special about several teachers at once: joined layers, timesteps, members' errors."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from distill.teacher import member_factory
from teachers import ensemble as ensembles
from teachers.diffusers_unet import diffusers_unet
from teachers.ensemble import Ensemble
from teachers.timm_model import timm_model

CHECKOUT = Path(__file__).resolve().parents[2]
ensemble = partial(ensembles.ensemble, factory_of=member_factory)
VIT = {"name": "timm", "path": "test_vit", "random_weights": 0}
TIMESTEPS = torch.tensor([0, 99, 40])


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two UNets of 8 and 16 channels at 16 px; the second one's schedule has half the steps."""
    folders = [tmp_path_factory.mktemp("unets") / name for name in ("first", "second")]
    for seed, (folder, steps) in enumerate(zip(folders, (100, 50), strict=True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=16,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=4,
            )
        scheduler = DDPMScheduler(num_train_timesteps=steps, beta_end=2 / steps)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def members(unets: list[str]) -> dict[str, Any]:
    return {"a": {"name": "diffusers_unet", "path": unets[0]}, "vit": VIT}


@pytest.fixture
def images() -> Tensor:
    return torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_a_layer_of_one_member_is_its_own_map(
    members: dict[str, Any], unets: list[str], images: Tensor
) -> None:
    both = ensemble("", members=members, layers=("vit/blocks.1", "a/mid_block"))
    features = both.features(images, TIMESTEPS, seeded())
    assert list(features) == ["vit/blocks.1", "a/mid_block"]
    unet = diffusers_unet(unets[0], layers=("mid_block",))
    expected = unet.features(images, TIMESTEPS, seeded())["mid_block"]
    assert torch.equal(features["a/mid_block"], expected)
    vit = timm_model("test_vit", random_weights=0, layers=("blocks.1",))
    expected = vit.features(images, 0 * TIMESTEPS)["blocks.1"]
    assert torch.equal(features["vit/blocks.1"], expected)


@pytest.mark.parametrize("input", ["noised", "average"])
def test_joined_layers_are_resized_to_the_finest_and_weigh_the_same(
    members: dict[str, Any], images: Tensor, input: Any
) -> None:
    joined = "vit/blocks.1+a/mid_block+a/down_blocks.0"
    both = ensemble("", members=members, layers=(joined, "vit/blocks.1"), input=input)
    assert (both.channels[joined], both.reductions[joined]) == (64 + 16 + 8, 2)
    feature, alone = both.features(images, TIMESTEPS, seeded()).values()
    assert feature.shape == (3, 88, 16, 16)
    vit, *unet = feature.split((64, 16, 8), dim=1)
    for part in (vit, *unet):
        torch.testing.assert_close(part.square().mean(dim=(1, 2, 3)), torch.ones(3))
    wide = F.interpolate(alone, (16, 16), mode="bilinear")  # (3, 64, 2, 2) before
    cosine = F.cosine_similarity(vit.flatten(1), wide.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))


def test_an_image_without_features_stays_finite() -> None:
    class Dark:
        name, fingerprint, channels, reductions = "dark", "", {"x": 1, "y": 1}, {"x": 1, "y": 1}
        noise_schedule = timm_model("test_resnet", random_weights=0, layers=()).noise_schedule

        def features(self, images: Tensor, *rest: Any) -> dict[str, Tensor]:
            return {name: torch.zeros(len(images), 1, 4, 4) for name in "xy"}

    module = Ensemble({"dark": Dark()}, {"both": (("dark", "x"), ("dark", "y"))})  # type: ignore[arg-type]
    both = module.features(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))["both"]
    assert torch.equal(both, torch.zeros(2, 2, 4, 4))


def test_other_members_see_the_nearest_noise_fraction_and_draw_after_the_first(
    unets: list[str], images: Tensor
) -> None:
    pair = {
        name: {"name": "diffusers_unet", "path": path}
        for name, path in zip("ab", unets, strict=True)
    }
    both = ensemble("", members=pair, layers=("b/mid_block", "a/mid_block"))
    features = both.features(images, TIMESTEPS, seeded())
    first, second = (diffusers_unet(path, layers=("mid_block",)) for path in unets)
    fractions = first.noise_schedule.noise_fraction(TIMESTEPS)
    table = second.noise_schedule.noise_fraction(torch.arange(50))
    nearest = torch.tensor([int((table - fraction).abs().argmin()) for fraction in fractions])
    assert nearest.tolist() != TIMESTEPS.tolist()
    assert len(both.noise_schedule) == 100
    generator = seeded()
    for name, unet, timesteps in (("a", first, TIMESTEPS), ("b", second, nearest)):
        expected = unet.features(images, timesteps, generator)["mid_block"]
        assert torch.equal(features[f"{name}/mid_block"], expected)


def test_timesteps_are_those_of_the_first_member_that_has_any(members: dict[str, Any]) -> None:
    reordered = dict(reversed(members.items()))
    both = ensemble("", members=reordered, layers=("vit/blocks.1", "a/mid_block"))
    assert (next(iter(both.members)), len(both.noise_schedule)) == ("vit", 100)
    alone = ensemble("", members={"vit": VIT}, layers=("vit/blocks.1",))
    assert len(alone.noise_schedule) == 1


def test_members_have_image_sizes_of_their_own(members: dict[str, Any], images: Tensor) -> None:
    members["vit"] = {**VIT, "image_size": 64}
    layers = ("vit/blocks.1", "a/mid_block", "vit/blocks.1+a/mid_block")
    both = ensemble("", members=members, layers=layers, image_size=16)
    sides = [x.shape[-1] for x in both.features(images, TIMESTEPS, seeded()).values()]
    assert sides == [4, 8, 8]


def test_name_fingerprint_and_flops_are_of_all_members(
    members: dict[str, Any], unets: list[str]
) -> None:
    layers = ("a/mid_block", "vit/blocks.1")
    both = ensemble("", members=members, layers=layers)
    vit = timm_model("test_vit", random_weights=0, layers=("blocks.1",))
    unet = diffusers_unet(unets[0], layers=("mid_block",))
    assert both.name == "first+test_vit-random0"
    pairs = zip(unet.flops(32), vit.flops(32), strict=True)
    assert both.flops(32) == tuple(a + b for a, b in pairs)
    assert both.parameters == unet.parameters + vit.parameters > 0
    reordered = dict(reversed(members.items()))  # noise is drawn in another order
    changed = members | {"a": {"name": "diffusers_unet", "path": unets[1]}}
    others = (ensemble("", members=m, layers=layers) for m in (members, reordered, changed))
    same, *different = (other.fingerprint for other in others)
    assert same == both.fingerprint
    assert len({same, *different}) == 3


@pytest.mark.parametrize(
    ("change", "layers", "words"),
    [
        ({}, ("a/mid_blok", "vit/norm"), "member 'a': no layer 'mid_blok'; .*'mid_block'"),
        ({}, ("a/mid_block+vit",), r"no layer 'a/mid_block\+vit'; choose from a/LAYER, vit/"),
        ({}, ("a/mid_block", "dino/norm"), "no layer 'dino/norm'; choose from a/LAYER"),
        ({}, ("a/mid_block+a/mid_block", "vit/norm"), "names the same layer twice"),
        ({}, ("a/mid_block",), "member 'vit': none of its layers is used; leave it out"),
        ({"name": "tim"}, None, "member 'vit': name: unknown name 'tim'; did you mean 'timm'?"),
        ({"name": "no.such:Here"}, None, "member 'vit': name: 'no.such:Here' cannot be"),
        ({"name": "torch:Here"}, None, "member 'vit': name: module 'torch' has no 'Here'"),
        ({"path": "test_vt"}, None, "member 'vit': timm has no model 'test_vt'"),
        (
            {"path": "local-dir:/none"},
            None,
            "member 'vit': cannot read the config of 'local-dir:/none'",
        ),
        (
            {"size": 3},
            None,
            "member 'vit': unknown key 'size'; choose from name, path, ",
        ),
        (
            {"random_weight": 0},
            None,
            "member 'vit': unknown key 'random_weight'; did you mean 'random_weights'",
        ),
        (
            {"options": {"kwarg": 3}},
            None,
            r"member 'vit': unknown key 'options\.kwarg'; did you mean 'options\.kwargs'",
        ),
        ({"options": {"kwargs": 3}}, None, r"member 'vit': options\.kwargs: input should be a"),
        ({"options": {"dtype": 3}}, None, "member 'vit': option 'dtype' cannot be set per member"),
    ],
)
def test_mistakes_name_the_member(
    members: dict[str, Any], change: dict[str, Any], layers: Any, words: str
) -> None:
    members["vit"] = VIT | change
    layers = layers or ("a/mid_block", "vit/blocks.1")
    with pytest.raises((ValueError, OSError), match=words):
        ensemble("", members=members, layers=layers, dtype=torch.float32)


def test_members_are_needed_and_have_the_paths(members: dict[str, Any]) -> None:
    for wrong in (None, {}, ["a"]):
        with pytest.raises(ValueError, match=r"members must map names to \{name: "):
            ensemble("", members=wrong, layers=("a/x",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"member 'a/b': / and \+ join names to layers"):
        ensemble("", members={"a/b": VIT}, layers=("a/b/norm",))
    with pytest.raises(ValueError, match=r"path must be '' for an ensemble .*'x'"):
        ensemble("x", members=members, layers=("a/mid_block", "vit/norm"))


def test_a_member_may_be_a_teacher_of_ones_own_or_an_embedded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_members.py").write_text(
        "from teachers.diffusers_unet import diffusers_unet as mine\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    path = "teachers/pretrained/shapes"
    member = {"name": "my_members:mine", "path": path}
    own = ensemble("", members={"a": member}, layers=("a/mid_block",))
    (channels,) = diffusers_unet(str(CHECKOUT / path), layers=["mid_block"]).channels.values()
    assert own.channels == {"a/mid_block": channels}
