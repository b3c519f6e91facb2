"""Light segmentation heads over one or several feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits bilinearly to a mask's size: (B, C, h, w) -> (B, C, *size) float32."""
    if logits.shape[-2:] == size:
        return logits.float()
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """One linear classifier of every position, over all maps together.

    BatchNorm and a 1x1 convolution for each map, summed at the finest map's grid. This is the
    linear layer over the resized and concatenated maps: a 1x1 convolution and bilinear resizing
    commute, so that only `classes` channels are ever resized.

    Args:
        channels: Channels of each map.
        classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(
            # One bias for the sum is enough: the first map's.
            nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1, bias=index == 0))
            for index, width in enumerate(channels)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C_i, h_i, w_i), in the order of `channels` -> (B, classes, h, w), at the
        finest."""
        finest = _finest_size(maps)
        logits = [
            resize_logits(classify(x), finest)
            for classify, x in zip(self.classifiers, maps, strict=True)
        ]
        return torch.stack(logits).sum(dim=0)


class PyramidHead(nn.Module):
    """A feature pyramid (Lin et al. 2017) reduced to its finest level.

    Every map goes to `width` channels and the finest grid, and is summed; one 3x3 convolution and
    a classifier follow. With maps of one size, as a plain ViT has, nothing is resized.

    Args:
        channels: Channels of each map.
        classes: Number of classes.
        width: Channels inside the head.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int = 64) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 1, bias=False), nn.BatchNorm2d(width))
            for count in channels
        )
        self.merge = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C_i, h_i, w_i), in the order of `channels` -> (B, classes, h, w), at the
        finest."""
        finest = _finest_size(maps)
        levels = [
            F.interpolate(lateral(x), finest, mode="bilinear", align_corners=False)
            for lateral, x in zip(self.laterals, maps, strict=True)
        ]
        logits: Tensor = self.classifier(self.merge(torch.stack(levels).sum(dim=0)))
        return logits


class FullyConvolutionalHead(nn.Module):
    """torchvision's FCN head (Long et al. 2015), on the last map only: a 3x3 convolution to a
    quarter of the channels, dropout and a classifier.

    Published FCNs keep the last map at an eighth of the image; set the backbone's `output_stride`.

    Args:
        channels: Channels of each map.
        classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        from torchvision.models.segmentation.fcn import FCNHead

        self.decoder = FCNHead(channels[-1], classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C_i, h_i, w_i), in the order of `channels` -> (B, classes, h, w) at the last
        map's grid."""
        logits: Tensor = self.decoder(maps[-1])
        return logits


def _finest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    return max(x.shape[-2] for x in maps), max(x.shape[-1] for x in maps)
