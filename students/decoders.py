"""Decoders of segmentation-models-pytorch as heads of a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Name = Literal["upernet", "deeplabv3plus", "segformer"]
WIDTH = 256


class DecoderHead(nn.Module):
    """UPerNet (Xiao et al. 2018), DeepLabV3+ (Chen et al. 2018) or SegFormer's (Xie et al. 2021).

    The library's decoders expect maps of 1/4 to 1/32 of the image. Maps of other sizes are resized
    where a decoder does not do so itself: DeepLabV3+ gets the last one at a quarter of the first
    one's side, as with an output stride of 16.

    Args:
        name: The decoder.
        channels: Channels of each map; three or four maps.
        classes: Number of classes.

    Raises:
        ValueError: segmentation-models-pytorch is not installed, or there are too few maps.
    """

    def __init__(self, name: Name, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        if len(channels) not in (3, 4):
            raise ValueError(f"head {name!r} needs three or four maps, got {len(channels)}")
        try:
            from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
            from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError as error:
            raise ValueError(
                f"head {name!r} needs segmentation-models-pytorch: pip install "
                "'diffusion-distill[segmentation]'"
            ) from error
        self.name = name
        widths = [3, 0, *channels]  # of the image, and of a map at 1/2 that there is not
        depth = len(widths) - 1
        if name == "upernet":
            self.decoder = UPerNetDecoder(widths, depth, WIDTH)
        elif name == "segformer":
            self.decoder = SegformerDecoder(widths, depth, WIDTH)
        else:
            self.decoder = DeepLabV3PlusDecoder(
                widths,
                encoder_depth=5,
                out_channels=WIDTH,
                atrous_rates=(12, 24, 36),
                output_stride=16,
                aspp_separable=True,
                aspp_dropout=0.5,
            )
        self.classifier = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C_i, h_i, w_i), finest first -> (B, classes, h, w) at the finest map's grid;
        DeepLabV3+ may add up to three positions per side."""
        first, *others = maps
        height, width = first.shape[-2:]
        if self.name == "deeplabv3plus":
            quarter = -(-height // 4), -(-width // 4)
            first = _resized(first, (4 * quarter[0], 4 * quarter[1]))
            others[-1] = _resized(others[-1], quarter)
        none = first.new_empty(len(first), 0, 4 * height, 4 * width)
        logits: Tensor = self.classifier(self.decoder([none, none, first, *others]))
        return logits


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
