"""Pictures of an evaluation: the confusion matrix, and the best and worst images with overlays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distill.drawing.overlays import blend
from distill.drawing.plots import ARM_COLOURS, RIGHT, STYLE, WRONG, write_figure

NUMBERED = 20  # classes up to which a cell has room for its number
HIGHEST = 10.6  # inches, 1,590 px: more does not fit onto a screen


def confusion(path: str | Path, counts: Tensor, class_names: Sequence[str]) -> None:
    """Write a confusion matrix, in shares of each true class.

    Args:
        path: A PNG.
        counts: (C, C) int64, truth in rows, prediction in columns.
        class_names: C of them.
    """
    matrix = counts.double().cpu().numpy()
    rows = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, rows, out=np.full_like(matrix, np.nan), where=rows > 0)
    count = len(class_names)
    with rc_context({**STYLE, "axes.grid": False}):
        side = 2.2 + min(0.42, 12 / count) * count
        figure = Figure(figsize=(side + 0.9, side), dpi=150, layout="compressed")
        axes = figure.subplots()
        # Errors spread over many classes are faint, and no number tells them
        norm = PowerNorm(1.0 if count <= NUMBERED else 0.5, vmin=0.0, vmax=1.0)
        image = axes.imshow(shares, cmap="Blues", norm=norm)
        step = max(1, -(-count // 40))
        ticks, labels = range(0, count, step), list(class_names)[::step]
        axes.set_xticks(ticks, labels, rotation=90)
        axes.set_yticks(ticks, labels)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title("share of each true class")
        if count <= NUMBERED:
            for row, column in zip(*np.nonzero(np.nan_to_num(shares) >= 0.005), strict=True):
                share = shares[row, column]
                colour = "white" if share > 0.6 else "0.2"
                text = f"{100 * share:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
        per_cent = PercentFormatter(1.0)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, format=per_cent)
        bar.outline.set_visible(False)
        write_figure(figure, path)


class Prediction(NamedTuple):
    """An image with its truth and prediction."""

    title: str
    image: Tensor
    """(3, H, W) float in [0, 1]."""
    truth: Tensor
    """(h, w) classes, a class, (), or points (K, 2) as shares of the image's width and height."""
    guess: Tensor
    """The prediction, in the form of `truth`."""


def overlays(
    path: str | Path, shown: Sequence[Prediction], class_names: Sequence[str], palette: ArrayLike
) -> None:
    """Write images with truth and prediction: classes of pixels or points over them, or classes
    below.

    Args:
        path: A PNG.
        shown: What to show, in this order.
        class_names: Name of each class; other values are not labelled.
        palette: (C, 3), RGB in 0..255.
    """
    pictures = [
        item.image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy() for item in shown
    ]
    with rc_context({**STYLE, "axes.grid": False}):
        if shown[0].truth.is_floating_point():
            figure = _dotted(pictures, shown)
        elif shown[0].truth.ndim:
            colours = np.asarray(palette, dtype=np.uint8)
            figure = _laid_over(pictures, shown, class_names, colours)
        else:
            figure = _named_below(pictures, shown, class_names)
        write_figure(figure, path)


def _laid_over(
    pictures: Sequence[NDArray[Any]],
    shown: Sequence[Prediction],
    class_names: Sequence[str],
    colours: NDArray[np.uint8],
) -> Figure:
    """Two images per row, the first half on the left: each alone, under the truth, and under the
    prediction; the classes that occur are named below."""
    tallest = max(item.truth.shape[0] / item.truth.shape[1] for item in shown)
    across = 2 if len(shown) > 2 else 1
    rows = -(-len(shown) // across)
    tall = min(HIGHEST, (2.2 * tallest + 0.35) * rows + 0.9)
    figure = Figure(figsize=(6.9 * across, tall), dpi=150, layout="constrained")
    grid = figure.subplots(rows, 3 * across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    lines = np.concatenate(np.split(grid, across, axis=1))  # three panels each
    present: set[int] = set()
    for line, picture, item in zip(lines, pictures, shown, strict=False):
        below = _resized(picture, item.truth.shape)  # an image is scored at another shape
        _image(line[0], below, item.title or "image")
        for axes, mask, title in (
            (line[1], item.truth, "truth"),
            (line[2], item.guess, "prediction"),
        ):
            classes = mask.cpu().numpy()
            present |= set(np.unique(classes).tolist())
            _image(axes, np.asarray(blend(below, classes.astype(np.uint8), colours)), title)
    patches = [
        Patch(facecolor=(colours[index] / 255).tolist(), label=name)
        for index, name in enumerate(class_names)
        if index in present
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=5 * across)
    return figure


def _named_below(
    pictures: Sequence[NDArray[Any]], shown: Sequence[Prediction], class_names: Sequence[str]
) -> Figure:
    """Four images per row, with predicted and true class."""
    figure, panels = _panels(len(shown))
    for axes, picture, item in zip(panels, pictures, shown, strict=True):
        _image(axes, picture, item.title)
        right = int(item.guess) == int(item.truth)
        is_not = "" if right else f", is {class_names[int(item.truth)]}"
        axes.set_xlabel(f"{class_names[int(item.guess)]}{is_not}", color=RIGHT if right else WRONG)
    return figure


def _dotted(pictures: Sequence[NDArray[Any]], shown: Sequence[Prediction]) -> Figure:
    """Four images per row, with true and predicted points and their distances."""
    figure, panels = _panels(len(shown))
    for axes, picture, item in zip(panels, pictures, shown, strict=True):
        _image(axes, picture, item.title)
        height, width = picture.shape[:2]
        # The picture's first pixel has its centre, not its corner, at 0.
        places = [x.cpu().numpy() * (width, height) - 0.5 for x in (item.truth, item.guess)]
        lines = np.stack(places).transpose(2, 1, 0)  # x and y, the points, from truth to guess
        axes.plot(*[x.T for x in lines], color=WRONG, lw=0.6)
        for points, colour in zip(places, (RIGHT, WRONG), strict=True):
            axes.plot(*points.T, ".", color=colour, ms=4, mew=0)
    legend = [Line2D([], [], color=colour, marker=".", ls="") for colour in (RIGHT, WRONG)]
    figure.legend(legend, ["truth", "prediction"], loc="outside lower center", ncols=2)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, four per row."""
    rows = -(-count // 4)
    figure = Figure(figsize=(9.0, 2.6 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def _image(axes: Axes, picture: NDArray[Any], title: str) -> None:
    axes.set_axis_on()
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _resized(picture: NDArray[Any], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in [0, 1] at a mask's size (h, w): (h, w, 3) in 0..255."""
    rows, columns = (
        np.arange(new) * old // new for new, old in zip(size, picture.shape[:2], strict=True)
    )
    resized: NDArray[np.uint8] = (255 * picture[rows][:, columns]).astype(np.uint8)
    return resized


def against_speed(
    path: str | Path,
    names: Sequence[str],
    speeds: Sequence[float],
    scores: Sequence[float],
    metric: str,
    falling: bool = False,
) -> None:
    """Write a scatter of scores against images per second, both better up and to the right.

    Args:
        path: A PNG.
        names: Names of the points.
        speeds: Images per second.
        scores: In points.
        metric: Name of the score.
        falling: Whether a lower one is better, so that the axis runs down.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
        axes = figure.subplots()
        for number, (name, speed, score) in enumerate(zip(names, speeds, scores, strict=True)):
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            axes.scatter([speed], [score], color=colour, s=36, label=name, zorder=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.15)
        axes.set(xlabel="images per second", ylabel=metric)
        if falling:
            axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=1)
        write_figure(figure, path)
