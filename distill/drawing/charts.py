"""The pictures of a report that a run does not draw itself."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distill.drawing.plots import ARM_COLOURS, STYLE, shades, write_figure
from distill.intervals import interval

COLUMNS = 8
ACROSS = 4  # panels in a row: of more, a page shows too little


def scores(path: str | Path, rows: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> None:
    """Write a point for the mean of each series in each row, its 95% interval, and pale the values.

    Args:
        path: A PNG.
        rows: Name of a row, from the top -> name of a series -> one value per seed, in points.
        label: Label of the axis.
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    with rc_context(STYLE):
        height = (0.18 + 0.16 * len(series)) * len(rows) + 0.9
        figure = Figure(figsize=(7.0, height), dpi=150, layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(series):
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
            for position, row in enumerate(rows.values()):
                if name in row:
                    _point(axes, position + shift, row[name], colour)
            axes.plot([], [], "o", color=colour, label=name)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=len(series), handletextpad=0.1)
        write_figure(figure, path)


def panels(
    path: str | Path,
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    baselines: Container[str] = (),
) -> None:
    """Write panels side by side, or below each other, that share their rows, with rows as in
    `scores`.

    Args:
        path: A PNG.
        rows: Title of a panel -> name of a row -> one value per seed, in points. The first panel
            has all rows; those after it show differences, so that 0 is marked.
        baselines: Rows that are grey.
    """
    names = list(next(iter(rows.values())))
    down = -(-len(rows) // ACROSS)
    across = -(-len(rows) // down)
    with rc_context(STYLE):
        size = (3.4 * across + 1.2, (0.34 * len(names) + 1.0) * down)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for axes in grid[len(rows) :]:
            axes.set_axis_off()
        grid = grid[: len(rows)]
        for axes, (title, panel) in zip(grid, rows.items(), strict=True):
            for position, name in enumerate(names):
                if name in panel:
                    _point(axes, position, panel[name], ARM_COLOURS[5 if name in baselines else 0])
            axes.set(title=title, xlabel="points")
            axes.grid(axis="y", visible=False)
        for axes in grid[1:]:
            axes.axvline(0.0, color="0.45", lw=0.9, ls="--")
        grid[0].set_yticks(range(len(names)), names)
        grid[0].set_ylim(len(names) - 0.5, -0.5)
        write_figure(figure, path)


def _point(axes: Axes, height: float, values: Sequence[float], colour: str) -> None:
    found = interval(values)
    if found.bounds is not None:
        axes.plot(found.bounds, [height, height], color=colour, lw=1.6)
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.35, ms=6, mew=0)
    axes.plot(found.mean, height, "o", color=colour, ms=4.5)


def by_class(
    path: str | Path,
    *,
    distribution: ArrayLike,
    names: Sequence[str],
    timesteps: ArrayLike,
    noise_fraction: ArrayLike,
) -> None:
    """Write which timesteps the policy prefers for the images of each class.

    Args:
        path: A PNG.
        distribution: (L, K) probability of each timestep, one row per class.
        names: L, of the classes.
        timesteps: (K,) the bins' timesteps.
        noise_fraction: (K,) share of noise at each of them, in [0, 1].
    """
    shares, bins = np.asarray(distribution, dtype=np.float64), np.asarray(timesteps)
    noise = np.asarray(noise_fraction)
    with rc_context({**STYLE, "axes.grid": False}):
        size = (7.5, 0.22 * len(names) + 1.5)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, **shades(shares), aspect="auto")
        axes.spines[:].set_visible(False)
        axes.set_yticks(range(len(names)), list(names))
        shown = list(range(0, len(bins), max(1, -(-len(bins) // 14))))
        axes.set_xticks(shown, [f"{bins[i]}\n{noise[i]:.2f}" for i in shown], fontsize=7)
        axes.set_xlabel("timestep t, noise fraction")
        bar = figure.colorbar(image, ax=axes, label="probability", pad=0.015)
        bar.outline.set_visible(False)
        write_figure(figure, path)


def extremes(
    path: str | Path,
    smallest: Sequence[tuple[Tensor, str]],
    largest: Sequence[tuple[Tensor, str]],
) -> None:
    """Write the images for which a policy prefers small, and large, timesteps.

    Args:
        path: A PNG.
        smallest: Image (3, H, W) uint8 and what stands above it, from the smallest timestep.
        largest: Images and captions from the largest timestep.
    """
    rows = -(-len(smallest) // COLUMNS)
    height, width = smallest[0][0].shape[-2:]
    lines = 1 + max(caption.count("\n") for _, caption in (*smallest, *largest))
    row_height = 1.05 * height / width + 0.12 + 0.13 * lines
    with rc_context({**STYLE, "axes.grid": False}):
        size = (1.05 * COLUMNS, 2 * (rows * row_height + 0.4))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False).flat
        _grid(upper, smallest, "smallest timesteps", rows)
        _grid(lower, largest, "largest timesteps", rows)
        write_figure(figure, path)


def _grid(figure: SubFigure, images: Sequence[tuple[Tensor, str]], title: str, rows: int) -> None:
    figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, caption) in zip(grid.flat, images, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(caption, fontsize=7, fontweight="normal", loc="center")


def noise_floor(
    path: str | Path,
    floors: Mapping[str, Sequence[float | None]],
    timesteps: ArrayLike,
    noise_fraction: ArrayLike,
) -> None:
    """Write the target-noise floor by pair and timestep.

    Args:
        path: A PNG.
        floors: Name of a pair -> (K,) variances, None where none was measured.
        timesteps: (K,) ascending.
        noise_fraction: (K,) share of noise in x_t at each of them, in [0, 1].
    """
    at, noise = np.asarray(timesteps, dtype=np.float64), np.asarray(noise_fraction)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        for number, (pair, floor) in enumerate(floors.items()):
            values: NDArray[Any] = np.array(floor, dtype=np.float64)  # None becomes NaN
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            axes.plot(at, values, color=colour, marker="o", ms=3, label=pair)
        axes.set_ylim(bottom=0.0)
        margin = max(1.0, 0.03 * (at[-1] - at[0]))
        axes.set_xlim(at[0] - margin, at[-1] + margin)  # whichever were measured
        axes.set(xlabel="timestep t", ylabel="least mean squared error")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        above = axes.twiny()
        shown = slice(None, None, max(1, -(-len(at) // 8)))
        above.set_xticks(at[shown], [f"{x:.2f}" for x in noise[shown]])
        above.set_xlim(axes.get_xlim())
        above.grid(visible=False)
        above.set_xlabel("noise fraction")
        figure.legend(loc="outside right center")
        write_figure(figure, path)
