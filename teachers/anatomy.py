"""What is inside a UNet: the layers a user may name, their shapes, and what each costs.

All of it is read from one forward pass on torch's meta device: exact shapes and multiply-adds of
any architecture, without weights, memory or arithmetic.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BLOCK = re.compile(r"conv_in|mid_block|(down|up)_blocks\.\d+")


class TracedLayer(NamedTuple):
    """One call of one module, in the order in which they finish.

    Attributes:
        name: the module's name in the UNet.
        shape: of its (first) output tensor, for a batch of one.
        flops: spent from the start of the forward pass until it is done; two a multiply-add.
    """

    name: str
    shape: tuple[int, ...]
    flops: int


class LayerInfo(NamedTuple):
    """A line of the table of layers.

    Attributes:
        name: to be used in a recipe.
        channels: of its map.
        reduction: side of the UNet's input over the side of the map.
        cost: share in 0..1 of the forward's multiply-adds spent until the layer is done.
    """

    name: str
    channels: int
    reduction: int
    cost: float


def first_tensor(output: Any) -> Any:
    """A module's feature map: diffusers' down blocks answer (map, skip maps), most others a map."""
    return output[0] if isinstance(output, tuple) else output


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """A side, or height and width, as (height, width)."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def total_reduction(config: Mapping[str, Any]) -> int:
    """What both sides of an image must be a multiple of: each level but the last halves it."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def check_image_size(size: tuple[int, int], reduction: int) -> None:
    """Refuse an image (height, width) that the UNet's halvings do not divide.

    Raises:
        ValueError: with the nearest size that would do.
    """
    if any(side < reduction or side % reduction for side in size):
        fit = [max(reduction, round(side / reduction) * reduction) for side in size]
        raise ValueError(
            f"an image of {size[0]}x{size[1]} does not fit this teacher, whose UNet reduces "
            f"by {reduction}; {fit[0]}x{fit[1]} would do"
        )


def trace(config: Mapping[str, Any], image_size: int | Sequence[int]) -> list[TracedLayer]:
    """Every module call of one forward pass of the UNet that `config` describes.

    Raises:
        ValueError: the image size does not fit.
    """
    size = height_width(image_size)
    check_image_size(size, total_reduction(config))
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
        images = torch.empty(1, unet.config["in_channels"], *size)
        timesteps = torch.zeros(1, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    layers: list[TracedLayer] = []

    def record(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = first_tensor(output)
            if isinstance(output, Tensor):
                layers.append(TracedLayer(name, tuple(output.shape), counter.get_total_flops()))

        module.register_forward_hook(hook)

    for name, module in unet.named_modules():
        if name:
            record(name, module)
    with counter, torch.no_grad():
        unet(images, timesteps)
    return layers


def layer_table(config: Mapping[str, Any], image_size: int | Sequence[int]) -> list[LayerInfo]:
    """The UNet's blocks in the order in which they run, for images of that size.

    Raises:
        ValueError: the image size does not fit.
    """
    layers = trace(config, image_size)
    height, _ = height_width(image_size)
    return [
        LayerInfo(
            layer.name, layer.shape[1], height // layer.shape[2], layer.flops / layers[-1].flops
        )
        for layer in layers
        if BLOCK.fullmatch(layer.name)
    ]


def find_layer(name: str, layers: Sequence[TracedLayer]) -> TracedLayer:
    """The one call of the module `name`.

    Raises:
        ValueError: no such module ran, it ran twice, or its output is no (B, C, H, W) map.
    """
    calls = [layer for layer in layers if layer.name == name]
    maps = [layer.name for layer in layers if len(layer.shape) == 4]
    if not calls:
        close = difflib.get_close_matches(name, maps, n=1)
        blocks = ", ".join(known for known in maps if BLOCK.fullmatch(known))
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {blocks}"
        raise ValueError(f"layer {name!r} is not in this teacher; {hint}")
    if len(calls) > 1:
        raise ValueError(
            f"layer {name!r} runs {len(calls)} times in one forward pass; name one that runs once"
        )
    if name not in maps:
        raise ValueError(
            f"layer {name!r} gives {len(calls[0].shape)} dimensions, not a (B, C, H, W) feature map"
        )
    return calls[0]
