"""Inference beyond one look at the whole image: sliding windows, flips, several scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from students.heads import resize_logits

Predictor = Callable[[Tensor], Tensor]
"""Function from images (B, 3, H, W) in [0, 1] to logits (B, K) or (B, K, h, w)."""


def several_looks(
    predict: Predictor,
    *,
    size: tuple[int, int],
    window: tuple[int, int] | None = None,
    flip: bool = False,
    mirrored: Sequence[int] = (),
    scales: Sequence[float] = (1.0,),
) -> Predictor:
    """A predictor that averages several looks at an image.

    Args:
        predict: Scores of a batch at one size and orientation.
        size: (H, W) that `predict` was built for.
        window: (H, W) of windows that images are cut into, each resized to `size`; next ones begin
            at two thirds of its side, and logits are averaged where they overlap. None: whole.
        flip: A second look at the mirrored image.
        mirrored: Which class each becomes there, if any becomes another.
        scales: A look at the image resized by each; with `window`, cut then.

    Returns:
        A predictor; of a single look it gives that look's logits, otherwise the mean class
        probabilities, at the finest look's resolution, or of whole images their logarithms, whose
        softmax they are.
    """

    def look(images: Tensor) -> Tensor:
        return predict(images) if window is None else _slide(predict, images, window, size)

    def look_back(images: Tensor) -> Tensor:
        logits = look(images.flip(-1))
        if mirrored:
            logits = logits[:, list(mirrored)]
        return logits.flip(-1) if logits.ndim == 4 else logits

    def average(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        looks = []
        for scale in scales:
            sized = images
            if scale != 1:
                shape = scaled((height, width), scale)
                sized = F.interpolate(images, shape, mode="bilinear", antialias=True)
            looks += [look(sized), look_back(sized)] if flip else [look(sized)]
        if len(looks) == 1:
            return looks[0]
        dense = looks[0].ndim == 4
        if dense:
            finest = max((logits.shape[-2], logits.shape[-1]) for logits in looks)
            looks = [resize_logits(logits, finest) for logits in looks]
        mean = torch.stack([logits.float().softmax(1) for logits in looks]).mean(0)
        return mean if dense else mean.clamp(min=1e-12).log()

    return average


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(H, W) of an image at a scale; a pixel at least."""
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def _slide(
    predict: Predictor, images: Tensor, window: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W), from windows one after the other."""
    height, width = images.shape[-2:]
    tall, wide = min(window[0], height), min(window[1], width)
    total: Tensor | None = None
    seen = images.new_zeros(height, width)
    for top in _starts(height, tall):
        for left in _starts(width, wide):
            part = images[..., top : top + tall, left : left + wide]
            if (tall, wide) != size:
                part = F.interpolate(part, size, mode="bilinear", antialias=True)
            logits = resize_logits(predict(part), (tall, wide))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., top : top + tall, left : left + wide] += logits
            seen[top : top + tall, left : left + wide] += 1
    assert total is not None
    return total / seen


def _starts(length: int, window: int) -> list[int]:
    """Evenly spaced starts of windows from end to end, at most two thirds of a window apart."""
    steps = math.ceil(max(0, length - window) / max(1, 2 * window // 3))
    return [round(step * (length - window) / max(1, steps)) for step in range(steps + 1)]
