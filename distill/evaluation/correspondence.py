"""Semantic correspondence without training: a keypoint goes where its feature is most alike.

The nearest neighbour by cosine similarity on bilinearly upsampled features, as in DIFT (Tang et al.
2023), scored by PCK (Yang and Ramanan 2013) as on SPair-71k (Min et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from distill.benchmarks.geometric import KeypointPair, KeypointPairs
from distill.data import as_float
from distill.evaluation.backbones import Backbone

ALPHA = 0.1
"""Share of the longer side within which a point counts as right."""
CHUNK = 4096  # positions whose features are in memory at a time

Maps = Sequence[Tensor]
"""Feature maps of one image, (C, h, w) each."""


def features_at(maps: Maps, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Features at points, bilinear between positions; at borders those of the last position.

    Args:
        maps: (C, h, w) each; positions are the centres of the cells that tile the image.
        points: (N, 2), x and y in pixels of an image of `size`.
        size: (H, W).

    Returns:
        (N, D): each map's feature of length 1, side by side, of length 1 in all.
    """
    height, width = size
    grid = points / points.new_tensor([width, height]) * 2 - 1
    parts = [
        F.grid_sample(x[None], grid[None, None], padding_mode="border", align_corners=False)
        for x in maps
    ]
    return F.normalize(torch.cat([F.normalize(x[0, :, 0].T, dim=1) for x in parts], 1), dim=1)


def match(features: Tensor, maps: Maps, size: tuple[int, int]) -> Tensor:
    """The pixel whose feature is most alike, the first of several.

    Args:
        features: (N, D), of `features_at`, the points to find.
        maps: Those of the image to look in.
        size: (H, W) of that image: the centres of its pixels are compared.

    Returns:
        (N, 2), x and y.
    """
    height, width = size
    rows = torch.arange(height, device=features.device) + 0.5
    columns = torch.arange(width, device=features.device) + 0.5
    pixels = torch.cartesian_prod(rows, columns).flip(1)  # (H * W, 2), x and y
    best = features.new_full((len(features),), -torch.inf)
    found = features.new_zeros(len(features), 2)
    for chunk in torch.split(pixels, CHUNK):
        similarity, nearest = (features @ features_at(maps, chunk, size).T).max(dim=1)
        better = similarity > best
        best = torch.where(better, similarity, best)
        found[better] = chunk[nearest[better]]
    return found


class Matched(NamedTuple):
    """The result for one pair."""

    number: int
    """Index of the pair."""
    category: str
    found: Tensor
    """(N, 2): where the points were found, in pixels of the target."""
    in_box: Tensor
    """(N,) bool: within `ALPHA` of the longer side of the target's box."""
    in_image: Tensor
    """(N,) bool: within `ALPHA` of the longer side of the target image."""


def judge(number: int, pair: KeypointPair, found: Tensor) -> Matched:
    """Check which points of a pair were found. found: (N, 2), in pixels of the target."""
    distance = (found - pair.target_points).norm(dim=1)
    box = (pair.box[2:] - pair.box[:2]).max()
    side = max(pair.target.shape[1:])
    return Matched(number, pair.category, found, distance <= ALPHA * box, distance <= ALPHA * side)


def match_pairs(
    backbone: Backbone,
    pairs: KeypointPairs,
    indices: Sequence[int],
    *,
    size: tuple[int, int],
    device: torch.device | str,
    batch: int,
    progress: Callable[[int], object] = lambda images: None,
) -> list[Matched]:
    """Find the points of pairs by the features of a backbone.

    Args:
        backbone: On the device.
        pairs: Read one batch after the other.
        indices: Which of them.
        size: (H, W) that images are resized to for the backbone, whatever their aspect.
        device: The device on which features are computed.
        batch: Images per pass, at least 2.
        progress: Called with the number of images after each pass.
    """
    matched = []
    step = max(1, batch // 2)
    for start in range(0, len(indices), step):
        chosen = indices[start : start + step]
        read = [pairs[index] for index in chosen]
        maps = _maps(backbone, read, size, device)
        for index, pair in zip(chosen, read, strict=True):
            source, target = (maps[name] for name in pair.names)
            points = _scaled(pair.source_points, pair.source.shape[1:], size).to(device)
            found = match(features_at(source, points, size), target, size).cpu()
            matched.append(judge(index, pair, _scaled(found, size, pair.target.shape[1:])))
        progress(len(maps))
    return matched


def _maps(
    backbone: Backbone,
    pairs: Sequence[KeypointPair],
    size: tuple[int, int],
    device: torch.device | str,
) -> Mapping[str, Maps]:
    """The maps of each image of the pairs, by name; an image of several pairs is seen once."""
    images: dict[str, Tensor] = {}
    for pair in pairs:
        for name, image in zip(pair.names, (pair.source, pair.target), strict=True):
            if name not in images:
                images[name] = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    maps = backbone.maps(as_float(torch.stack(list(images.values())).to(device))).values()
    return {name: [x[row] for x in maps] for row, name in enumerate(images)}


def _scaled(points: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Points (N, 2) of an image of (H, W) `before` in pixels of the same one at `after`."""
    return points * points.new_tensor([after[1] / before[1], after[0] / before[0]])


def pck(matched: Sequence[Matched]) -> dict[str, Any]:
    """Percentages of correct keypoints, as shares in [0, 1].

    Args:
        matched: One pair at least.

    Returns:
        `pck_image` and `pck_box`, means over pairs of the share of their points that are right by
        the image's and by the box's size; `pck_image_points` and `pck_box_points`, shares of all
        points; `category`, the `pck_box` of each.
    """

    def mean_over_pairs(chosen: Sequence[Tensor]) -> float:
        return float(torch.stack([right.double().mean() for right in chosen]).mean())

    by_image, by_box = [one.in_image for one in matched], [one.in_box for one in matched]
    categories = sorted({one.category for one in matched})
    return {
        "pck_image": mean_over_pairs(by_image),
        "pck_image_points": float(torch.cat(by_image).double().mean()),
        "pck_box_points": float(torch.cat(by_box).double().mean()),
        "pck_box": mean_over_pairs(by_box),
        "category": {
            name: mean_over_pairs([one.in_box for one in matched if one.category == name])
            for name in categories
        },
    }
