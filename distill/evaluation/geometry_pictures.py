"""Pictures of correspondence and depth: matched keypoints, and depth maps beside their truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from distill.benchmarks.geometric import KeypointPair
from distill.drawing.plots import RIGHT, STYLE, WRONG, write_figure

GAP = 0.06  # between two images, in heights
DEPTH_MAP = "viridis_r"  # near is bright


class ShownPair(NamedTuple):
    """A pair, and where its points were found."""

    title: str
    pair: KeypointPair
    found: Tensor
    """(N, 2), in pixels of the target."""
    right: Tensor
    """(N,) bool."""


class ShownDepth(NamedTuple):
    """An image with the true and the predicted depth."""

    title: str
    image: Tensor
    """(3, H, W) float in [0, 1]."""
    truth: Tensor
    """(h, w), NaN where it is not scored."""
    guess: Tensor
    """The predicted depth, (h, w)."""


def matches(path: str | Path, shown: Sequence[ShownPair]) -> None:
    """Write pairs of images, a line from each keypoint to where it was found: green if that is
    right, otherwise red, with a dotted line on to the true place.

    Args:
        path: A PNG.
        shown: What to show, two pairs per row.
    """
    with rc_context({**STYLE, "axes.grid": False}):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(9.0, 2.4 * rows + 0.4), dpi=150, layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, item in zip(grid.flat, shown, strict=False):
            _pair(axes, item)
        lines = [Line2D([], [], color=colour) for colour in (RIGHT, WRONG)]
        lines.append(Line2D([], [], color=WRONG, linestyle=":"))
        names = ["found", "found elsewhere", "to the true place"]
        figure.legend(lines, names, loc="outside lower center", ncols=3)
        write_figure(figure, path)


def _pair(axes: Axes, item: ShownPair) -> None:
    """Both images at one height, side by side, and the lines."""
    pair, left = item.pair, 0.0
    offsets = []
    for image in (pair.source, pair.target):
        height, width = image.shape[1:]
        right = left + width / height
        axes.imshow(_picture(image), extent=(left, right, 1.0, 0.0), interpolation="nearest")
        offsets.append(left)
        left = right + GAP
    axes.set(xlim=(0.0, left - GAP), ylim=(1.0, 0.0))
    axes.set_title(item.title)
    begin = _placed(pair.source_points, pair.source, offsets[0])
    end = _placed(item.found, pair.target, offsets[1])
    truth = _placed(pair.target_points, pair.target, offsets[1])
    for start, found, true, right_one in zip(begin, end, truth, item.right.tolist(), strict=True):
        colour = RIGHT if right_one else WRONG
        axes.plot(*zip(start, found, strict=True), color=colour, marker="o", ms=2.5, lw=0.9)
        if not right_one:
            axes.plot(*zip(found, true, strict=True), color=colour, linestyle=":", lw=0.9)


def _placed(points: Tensor, image: Tensor, left: float) -> list[list[float]]:
    """Points of an image as places in a panel where it is one high and begins at `left`."""
    scaled = points.double() / image.shape[1]
    scaled[:, 0] += left
    placed: list[list[float]] = scaled.tolist()
    return placed


def depths(
    path: str | Path,
    shown: Sequence[ShownDepth],
    depth_range: tuple[float, float],
    unit: str,
) -> None:
    """Write images with true and predicted depth, one per row, all in one colour scale.

    Args:
        path: A PNG.
        shown: What to show, in this order; grey is not scored.
        depth_range: Nearest and farthest depth of the scale.
        unit: Of depth.
    """
    height, width = shown[0].image.shape[1:]
    size = (8.1, (2.6 * height / width + 0.3) * len(shown) + 0.2)
    colours = colormaps[DEPTH_MAP].with_extremes(bad="0.85")
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(len(shown), 3, squeeze=False)
        for line, item in zip(grid, shown, strict=True):
            panels: list[tuple[str, NDArray[Any]]] = [
                (item.title, item.image.permute(1, 2, 0).numpy()),
                ("truth", item.truth.numpy()),
                ("prediction", item.guess.numpy()),
            ]
            for axes, (title, picture) in zip(line, panels, strict=True):
                scale = dict(zip(("vmin", "vmax"), depth_range, strict=True))
                drawn = axes.imshow(picture, cmap=colours, interpolation="nearest", **scale)
                axes.set_title(title)
                axes.set_axis_off()
        bar = figure.colorbar(
            drawn, ax=grid, shrink=0.3, aspect=30, pad=0.01, label=f"depth, {unit}"
        )
        bar.outline.set_visible(False)
        write_figure(figure, path)


def _picture(image: Tensor) -> NDArray[Any]:
    """(3, H, W) -> (H, W, 3)."""
    picture: NDArray[Any] = image.permute(1, 2, 0).numpy()
    return picture
