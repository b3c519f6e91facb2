"""Decoders of segmentation-models-pytorch fit students of every shape, or say what is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from students.decoders import DecoderHead, Name
from students.student import Student

NAMES = ("upernet", "deeplabv3plus", "segformer")


def student(model: str, head: str, size: tuple[int, int] = (96, 64), **more: object) -> Student:
    return Student(model, classes=5, dense=True, image_size=size, head=head, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", NAMES)
@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_every_weight_learns_from_maps_of_any_size(model: str, head: str) -> None:
    network = student(model, head)
    logits = network(torch.rand(2, 3, 96, 64))[0]
    finest = min(
        info["reduction"]
        for info in network.backbone.feature_info
        if info["module"] in network.head_layers
    )
    height, width = 96 // finest, 64 // finest
    assert logits.shape[:2] == (2, 5)
    assert height <= logits.shape[2] < height + 4
    assert width <= logits.shape[3] < width + 4
    logits.square().mean().backward()
    assert network.head is not None
    assert all(weight.grad is not None for weight in network.head.parameters())


@pytest.mark.parametrize("head", NAMES)
def test_a_head_gets_the_maps_it_reads_finest_and_shallowest_first(head: str) -> None:
    network = student(
        "test_vit", head, head_layers=["blocks.4", "blocks.1", "blocks.3", "blocks.2"]
    )
    assert network.head_layers == ("blocks.1", "blocks.2", "blocks.3", "blocks.4")
    seen: list[torch.Tensor] = []
    assert network.head is not None
    network.head.register_forward_pre_hook(lambda head, given: seen.extend(given[0]))
    network.layers = network.head_layers
    named = network(torch.rand(2, 3, 96, 64))[1]
    assert len(seen) == 4
    for found, name in zip(seen, network.head_layers, strict=True):
        assert torch.equal(found, named[name])


@torch.no_grad()
@pytest.mark.parametrize("name", ["upernet", "deeplabv3plus"])
def test_the_last_map_is_looked_at_as_a_whole_and_the_first_one_locally(name: Name) -> None:
    """A channel of one position of each in turn is changed: how far does that reach?"""
    torch.manual_seed(0)
    head = DecoderHead(name, [8] * 4, 5).eval()
    maps = [torch.randn(1, 8, 16, 16) for _ in range(4)]

    def reach(index: int) -> float:
        changed = [x.clone() for x in maps]
        changed[index][0, 0, 5, 5] += 10  # where DeepLabV3+ samples its last one
        return float(((head(changed) - head(maps)).abs().amax(1) > 1e-6).float().mean())

    assert 0 < reach(0) < 0.5
    assert reach(3) == 1.0


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.upernet.decoder", None)
    with pytest.raises(ValueError, match=r"diffusion-distill\[segmentation\]"):
        student("test_resnet", "upernet")


def test_too_few_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="three or four maps, got 1"):
        student("test_resnet", "segformer", head_layers=["layer4"])
