"""The picture of `distill probe`: two heat maps, the head-room, and the effective rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from distill.checkpoint import replacing
from distill.drawing.plots import ARM_COLOURS, STYLE
from distill.probing.map_report import LayerMap

WAYS = {
    "uniform": "uniform",
    "fixed": "best fixed t",
    "learnt": "linear rule on the image",
    "honest": "honest oracle",
    "oracle": "oracle",
}


def layer_map(path: str | Path, found: LayerMap) -> None:
    """Write the map with that of random weights beside it, in one scale, and the best cell marked.

    Args:
        path: A PNG.
        found: The scores of every layer at every timestep.
    """
    trained, random = 100 * found.score.numpy(), 100 * found.random_score.numpy()
    low = float(min(trained.min(), random.min()))
    high = float(max(trained.max(), random.max()))
    rows, columns = trained.shape
    width = max(9.0, 0.95 * columns + 2.5)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(width, 0.3 * rows + 4.0), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(0.3 * rows + 1.0, 2.3))
        left = figure.add_subplot(grid[0, 0])
        right = figure.add_subplot(grid[0, 1], sharey=left)
        for axes, scores, title in ((left, trained, "teacher"), (right, random, "random weights")):
            image = _heat(axes, scores, found, (low, high))
            axes.set_title(f"{title}: {found.metric} of a linear probe")
        left.set_yticks(range(rows), found.layers)
        right.tick_params(axis="y", labelleft=False)
        row, column = found.best
        corner = (column - 0.5, row - 0.5)
        left.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d62728", lw=2.2))
        bar = figure.colorbar(image, ax=[left, right], label=f"{found.metric}, points", pad=0.01)
        bar.outline.set_visible(False)
        _head_room(figure.add_subplot(grid[1, 0]), found)
        _rank(figure.add_subplot(grid[1, 1]), found)
        with replacing(Path(path)) as file:
            figure.savefig(file, format="png")


def _heat(
    axes: Axes, scores: NDArray[np.float64], found: LayerMap, limits: tuple[float, float]
) -> AxesImage:
    """Layers from the top in the order in which they run, timesteps to the right."""
    image = axes.imshow(scores, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.spines[:].set_visible(False)
    labels = [
        f"{t}\n{x:.2f}"
        for t, x in zip(found.timesteps.tolist(), found.noise_fraction.tolist(), strict=True)
    ]
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("timestep t, noise fraction")
    middle = (limits[0] + limits[1]) / 2
    if scores.size <= 400:
        for (row, column), score in np.ndenumerate(scores):
            colour = "white" if score < middle else "black"
            text = f"{score:.{1 if scores.shape[1] <= 14 else 0}f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    return image


def _head_room(axes: Axes, found: LayerMap) -> None:
    """Rewards of the ways to choose, with their intervals."""
    room = found.rooms[found.best_layer]
    for index, name in enumerate(WAYS):
        mean, low, high = room.estimates[name]
        axes.errorbar(
            mean,
            index,
            xerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
            fmt="o",
            color=ARM_COLOURS[index],
            capsize=3,
        )
    labels = [
        f"best fixed t = {int(found.timesteps[room.fixed])}" if name == "fixed" else label
        for name, label in WAYS.items()
    ]
    axes.set_yticks(range(len(WAYS)), labels)
    axes.set_ylim(len(WAYS) - 0.5, -0.5)
    axes.grid(axis="x")
    mean, low, high = room.estimates["learnt_gain"]
    axes.set_xlabel(
        f"minus the cross-entropy of an image, nats ({room.images} images, 95%)\n"
        f"rule over the best constant, paired: {mean:+.3f} ({low:+.3f} to {high:+.3f})"
    )
    axes.set_title(f"head-room of {found.best_layer}")


def _rank(axes: Axes, found: LayerMap) -> None:
    """Draw the effective rank of the best layer, and that with random weights."""
    row, noise = found.best[0], found.noise_fraction.numpy()
    for rank, name, colour in (
        (found.rank[row], "teacher", ARM_COLOURS[0]),
        (found.random_rank[row], "random weights", ARM_COLOURS[5]),
    ):
        axes.plot(noise, rank.numpy(), color=colour, marker="o", ms=3, label=name)
    axes.grid()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("noise fraction")
    axes.legend(loc="best")
    axes.set_title(f"effective rank of {found.best_layer}")
