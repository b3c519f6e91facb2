"""The layers of a network that a user may name, their shapes, and what each costs.

All of it is read from one forward pass on torch's meta device: exact shapes and multiply-adds of
any architecture, without weights, memory or arithmetic.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BLOCK = re.compile(r"conv_in|mid_block|middle_block|layer\d+|(\w*blocks|stages|layers)\.\d+")


class TracedLayer(NamedTuple):
    """One call of one module, in the order in which they finish.

    Attributes:
        name: the module's name in the network.
        shape: of its feature map for a batch of one, or of its first tensor if it has no map.
        flops: spent from the start of the forward pass until it is done; two per multiply-add.
    """

    name: str
    shape: tuple[int, ...]
    flops: int

    @property
    def is_map(self) -> bool:
        """Whether the output is one map (1, C, h, w); windows of an image give several rows."""
        return len(self.shape) == 4 and self.shape[0] == 1


class LayerError(ValueError):
    """A layer that a network does not have, or that gives no feature map.

    Args:
        layer: its name, as requested.
        problem: one line that includes the name.
    """

    def __init__(self, layer: str, problem: str) -> None:
        super().__init__(problem)
        self.layer = layer


class LayerInfo(NamedTuple):
    """A row of the table of layers.

    Attributes:
        name: to be used in a recipe.
        channels: of its map.
        reduction: side of the image over the side of the map.
        cost: share in 0..1 of the forward's multiply-adds spent until the layer is done.
    """

    name: str
    channels: int
    reduction: int
    cost: float


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """A side, or height and width, as (height, width)."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def check_image_size(size: tuple[int, int], multiple: int) -> None:
    """Check that both sides of an image (height, width) are divisible by `multiple`.

    Raises:
        ValueError: names the nearest size that is.
    """
    if any(side < multiple or side % multiple for side in size):
        fit = [max(multiple, round(side / multiple) * multiple) for side in size]
        raise ValueError(
            f"image size {size[0]}x{size[1]} does not suit this teacher: both sides must be "
            f"divisible by {multiple}; try {fit[0]}x{fit[1]}"
        )


def trace(
    network: nn.Module, forward: Callable[[], Any], feature_map: Callable[[Any], Any]
) -> list[TracedLayer]:
    """Record every module call of one forward pass.

    Args:
        network: on the meta device; not used again by the caller.
        forward: runs the network once, for a batch of one.
        feature_map: turns a module's output into its map, (1, C, h, w), if it has one.
    """
    counter = FlopCounterMode(display=False)
    layers: list[TracedLayer] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = feature_map(output)
            if isinstance(output, Tensor):
                layers.append(TracedLayer(name, tuple(output.shape), counter.get_total_flops()))

        return hook

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(record(name))
    with counter:
        forward()
    return layers


def layer_table(layers: Sequence[TracedLayer], height: int) -> list[LayerInfo]:
    """The network's blocks in the order in which they run. height: of the image, in pixels."""
    return [
        LayerInfo(
            layer.name, layer.shape[1], height // layer.shape[2], layer.flops / layers[-1].flops
        )
        for layer in layers
        if BLOCK.fullmatch(layer.name) and layer.is_map
    ]


def find_layer(name: str, layers: Sequence[TracedLayer]) -> TracedLayer:
    """The one call of the module `name`.

    Raises:
        LayerError: no such module ran, it ran twice, or its output is not a (B, C, H, W) map of
            the one image.
    """
    calls = [layer for layer in layers if layer.name == name]
    maps = [layer.name for layer in layers if layer.is_map]
    if not calls:
        close = difflib.get_close_matches(name, maps, n=1)
        blocks = [known for known in maps if BLOCK.fullmatch(known)]
        known = ", ".join(blocks or list(dict.fromkeys(maps))[:8])
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {known}"
        raise LayerError(name, f"no layer {name!r}; {hint}")
    if len(calls) > 1:
        raise LayerError(
            name,
            f"layer {name!r} runs {len(calls)} times in one forward pass; name one that runs once",
        )
    if not calls[0].is_map and len(calls[0].shape) == 4:
        raise LayerError(
            name,
            f"layer {name!r} returns {calls[0].shape[0]} rows for one image (its windows, for "
            "example); name the block that contains it",
        )
    if name not in maps:
        raise LayerError(
            name,
            f"layer {name!r} returns {len(calls[0].shape)} dimensions, not a (B, C, H, W) feature "
            "map",
        )
    return calls[0]
