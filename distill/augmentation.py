"""Random changes to an image that its mask or its points follow, and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from distill.benchmarks import Task

Strength = Literal["none", "flip", "crop", "strong", "patch"]
Item = tuple[Tensor, Tensor | int]
Augmentation = Callable[[Tensor, Tensor | int], Item]
KEPT = (0.35, 1.0)
"""Smallest and largest share of the image's area that a segmentation crop keeps."""
TURN = 30.0
SIZES = (0.75, 1.25)


def augmentation(
    strength: Strength,
    task: Task | None,
    size: tuple[int, int],
    *,
    patch_scale: tuple[float, float] = (1.0, 1.0),
    mirrored: Sequence[int] = (),
) -> Augmentation:
    """Random changes to one uint8 image and its target, drawn from torch's default CPU generator.

    Args:
        strength: `none`; `flip`: left to right; `crop`: a random part too, for segmentation of a
            random scale, for landmarks a `RandomTurn`, otherwise shifted by up to an eighth of the
            side (borders mirrored: a teacher has never seen black ones); `strong`: brightness,
            contrast and colour too;
            `patch`: a random part of `size` px at the image's own scale, flipped.
        task: Decides which crop is meant.
        size: (H, W) of the images; a crop comes out at this size again. For `patch`, images may
            have any size; smaller ones are mirrored at their borders.
        patch_scale: See `RandomPatch`.
        mirrored: The point that each landmark, or the class that each class, becomes in the mirror
            image; empty: classes have no side.
    """
    height, width = size
    steps: list[Callable[..., object]] = [v2.Identity()]
    if strength in ("crop", "strong") and task == "segmentation":
        aspect = width / height
        steps.append(RandomPart(size, KEPT, ratio=(0.8 * aspect, 1.25 * aspect)))
    elif strength in ("crop", "strong") and task == "landmarks":
        steps.append(RandomTurn())
    elif strength in ("crop", "strong"):
        margins = [width // 8, height // 8]
        steps.append(v2.RandomCrop(size, padding=margins, padding_mode="reflect"))
    elif strength == "patch":
        steps.append(RandomPatch(size, patch_scale))
    if strength != "none":
        sides = bool(mirrored) or task == "landmarks"
        steps.append(RandomMirror(mirrored) if sides else v2.RandomHorizontalFlip())
    if strength == "strong":
        steps.append(v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05))
    transform = v2.Compose(steps)

    def apply(image: Tensor, target: Tensor | int) -> Item:
        plain = isinstance(target, int) or task == "landmarks"
        kept = target if plain else tv_tensors.Mask(target)
        changed, moved = transform(tv_tensors.Image(image), kept)
        moved = moved if isinstance(moved, int) else moved.as_subclass(Tensor)
        return changed.as_subclass(Tensor), moved

    return apply


def resize_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """(3, h, w) uint8 -> (3, *size), bilinear and antialiased."""
    resized: Tensor = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(h, w) -> size, each pixel the one whose centre is nearest; torchvision's own way with masks
    takes another one, which shifts them against their images."""
    resized: Tensor = F.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return resized


def _resized(view: tv_tensors.TVTensor, size: Sequence[int]) -> tv_tensors.TVTensor:
    plain = view.as_subclass(Tensor)
    resize = resize_mask if isinstance(view, tv_tensors.Mask) else resize_image
    return tv_tensors.wrap(resize(plain, size), like=view)


class RandomPart(v2.RandomResizedCrop):  # type: ignore[misc]
    """A random part of an image, and of its mask, at the size asked for."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resized(F.crop(inpt, **params), self.size)


class RandomPatch:
    """A random part of an image (and of its mask), at a random scale.

    Args:
        size: (H, W) of the patch.
        scale: Smallest and largest size of the patch relative to the part that it shows, drawn
            evenly on a logarithmic scale. Images smaller than that part are mirrored at their
            borders.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        self.size, self.scale = size, scale

    def __call__(self, *views: Any) -> Any:
        low, high = self.scale
        scale = low * (high / low) ** float(torch.rand(()))
        part = [max(1, round(side / scale)) for side in self.size]
        sides = views[0].shape[-2:]
        borders = [max(0, wanted - side) for wanted, side in zip(part, sides, strict=True)]
        room = [max(0, side - wanted) for wanted, side in zip(part, sides, strict=True)]
        corner = [int(torch.randint(most + 1, ())) for most in room]
        cut = [
            view
            if isinstance(view, int)
            else _resized(F.crop(_continued(view, borders), *corner, *part), self.size)
            for view in views
        ]
        return tuple(cut)


def _continued(image: tv_tensors.TVTensor, borders: Sequence[int]) -> tv_tensors.TVTensor:
    """Extend an image (..., h, w) by `borders` rows and columns in total, mirroring its content."""
    if not any(borders):
        return image
    pad = [(0, 0)] * (image.ndim - 2) + [(border // 2, border - border // 2) for border in borders]
    # torch reflects no further than the image is wide; numpy goes on.
    mirrored = torch.from_numpy(np.pad(image.numpy(), pad, mode="reflect"))
    return tv_tensors.wrap(mirrored, like=image)


class RandomTurn:
    """An image and its points, turned by up to 30 degrees and made 0.75 to 1.25 times as large
    around the middle, as HRNet augments faces (Sun et al. 2019); borders are mirrored."""

    def __call__(self, image: tv_tensors.Image, points: Tensor | int) -> Any:
        angle, scale = torch.rand(2).tolist()
        angle = math.radians(TURN * (2 * angle - 1))
        scale = SIZES[0] + (SIZES[1] - SIZES[0]) * scale
        height, width = image.shape[-2:]
        sine, cosine = math.sin(angle) / scale, math.cos(angle) / scale
        # From a place in the new image to that in the old one, from -1 to 1 in both.
        back = torch.tensor([[cosine, -sine * height / width], [sine * width / height, cosine]])
        theta = torch.cat([back, torch.zeros(2, 1)], dim=1)
        grid = affine_grid(theta[None], [1, 3, height, width], align_corners=False)
        old = image.as_subclass(Tensor)[None].float()
        new = grid_sample(old, grid, padding_mode="reflection", align_corners=False)[0]
        turned = tv_tensors.Image(new.round().clamp(0, 255).to(torch.uint8))
        if isinstance(points, int):
            return turned, points
        return turned, ((2 * points - 1) @ back.inverse().T + 1) / 2


class RandomMirror:
    """An image with its points, its mask or its class, left to right in half of the cases.

    Args:
        mirrored: Which point, or which class, each becomes.
    """

    def __init__(self, mirrored: Sequence[int]) -> None:
        self.mirrored = mirrored

    def __call__(self, image: tv_tensors.Image, target: Tensor | int) -> Any:
        if torch.rand(()) >= 0.5:
            return image, target
        if isinstance(target, int):
            sided = 0 <= target < len(self.mirrored)
            moved: Tensor | int = self.mirrored[target] if sided else target
        elif isinstance(target, tv_tensors.Mask):
            moved = mirror_mask(target, self.mirrored)
        else:
            moved = mirror_points(target, self.mirrored)
        return tv_tensors.Image(image.flip(-1)), moved


def mirror_points(points: Tensor, mirrored: Sequence[int]) -> Tensor:
    """Mirror points (K, 2) left to right, and put each where its mirrored number says."""
    return torch.stack([1 - points[:, 0], points[:, 1]], dim=1)[list(mirrored)]


def mirror_mask(mask: Tensor, mirrored: Sequence[int]) -> Tensor:
    """Mirror a mask (H, W) uint8 left to right; values that are not classes stay."""
    becomes = torch.arange(256, dtype=torch.uint8)
    becomes[: len(mirrored)] = torch.tensor(mirrored, dtype=torch.uint8)
    return becomes[mask.as_subclass(Tensor).flip(-1).long()]
