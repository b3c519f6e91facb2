"""The pictures of a run: training curves, the timesteps that the policy preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from distill.checkpoint import replacing
from distill.metrics import TITLES

STYLE: Any = {  # matplotlib types its keys as a literal of all of them
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "0.3",
    "axes.edgecolor": "0.75",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # names are data: a dollar sign in one is no formula
}
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#7f7f7f")
RIGHT, WRONG = "#1a7f4b", "#c0392b"
PANELS = {
    "loss/task": "task loss",
    "loss/feature": "feature loss",
    **TITLES,
    "reward": "reward",
    "lr": "learning rate",
}


def curves(
    path: str | Path, rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str] = PANELS
) -> None:
    """Write training curves, one panel per quantity and one colour per arm.

    Args:
        path: A PNG.
        rows: Lines of metrics.jsonl: `step`, `arm`, and some of the quantities in `wanted`, under
            that key or with a prefix (`val/miou`). Missing and non-finite values are left out.
        wanted: Title of the panel of each quantity.
    """
    arms = list(dict.fromkeys(str(row.get("arm", "")) for row in rows))
    panels = [
        (key, title)
        for key, title in wanted.items()
        if any(_value(row, key) is not None for row in rows)
    ]
    columns = 3 if len(panels) > 4 else max(1, min(2, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    with rc_context(STYLE):
        size = (3.5 * columns, 2.3 * lines + 0.3)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (key, title) in zip(grid.flat, panels, strict=False):
            for number, arm in enumerate(arms):
                series = [
                    (row["step"], value)
                    for row in rows
                    if str(row.get("arm", "")) == arm and (value := _value(row, key)) is not None
                ]
                noisy = "loss" in key or "reward" in key
                _curve(axes, series, arm, ARM_COLOURS[number % len(ARM_COLOURS)], noisy)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            if key in TITLES:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step")
        handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        named = {str(name): line for name, line in handles.items() if not str(name).startswith("_")}
        if named and arms != [""]:
            figure.legend(
                named.values(), named.keys(), loc="outside upper center", ncols=len(named)
            )
        write_figure(figure, path)


def _value(row: Mapping[str, Any], key: str) -> float | None:
    """The row's finite value of a quantity, under its own key or behind a prefix."""
    for name, value in row.items():
        if name == key or name.endswith(f"/{key}"):
            return float(value) if value is not None and np.isfinite(value) else None
    return None


def _curve(
    axes: Axes, series: Sequence[tuple[int, float]], arm: str, colour: str, noisy: bool
) -> None:
    """A line with its few points; where there are many and noisy, pale under their running mean."""
    if not series:
        return
    steps, values = np.array(series, dtype=np.float64).T
    if not noisy or len(values) < 40:
        marker = "o" if len(values) < 25 else None
        axes.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=3, label=arm)
        return
    axes.plot(steps, values, color=colour, lw=0.6, alpha=0.25)
    axes.plot(steps, _running_mean(values, len(values) // 20), color=colour, lw=1.6, label=arm)


def _running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean over `reach` values to each side, fewer at the ends. (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    means: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means


def policy(
    path: str | Path,
    *,
    steps: ArrayLike,
    history: ArrayLike,
    timesteps: ArrayLike,
    noise_fraction: ArrayLike,
) -> None:
    """Write which timesteps the policy preferred over training, and in the end.

    Args:
        path: A PNG.
        steps: (S,) training steps, ascending.
        history: (S, K) probability of each timestep bin at those steps.
        timesteps: (K,) the bins' timesteps.
        noise_fraction: (K,) share of noise in x_t at each of them, see `NoiseSchedule`, in [0, 1].
    """
    at, bins = np.asarray(steps, dtype=np.float64), np.asarray(timesteps)
    shares, noise = np.asarray(history, dtype=np.float64), np.asarray(noise_fraction)
    if shares.shape != (len(at), len(bins)) or noise.shape != bins.shape:
        raise ValueError(
            f"history {shares.shape} does not match {len(at)} steps, {len(bins)} timesteps"
        )
    rows = np.arange(len(bins))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), dpi=150, layout="constrained")
        over_time, final = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1.0))
        edges = np.concatenate([[at[0]], (at[1:] + at[:-1]) / 2, [at[-1] + (len(at) == 1)]])
        mesh = over_time.pcolormesh(
            edges, np.arange(len(bins) + 1) - 0.5, shares.T, **shades(shares)
        )
        over_time.set(title="preferred timesteps", xlabel="step", ylabel="timestep t")
        over_time.grid(visible=False)
        shown = rows[:: max(1, -(-len(bins) // 12))]
        over_time.set_yticks(shown, [str(bins[row]) for row in shown])
        over_time.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar = figure.colorbar(mesh, ax=over_time, label="probability", pad=0.015)
        bar.outline.set_visible(False)

        final.barh(rows, shares[-1], height=0.8, color="#8c2981")
        final.axvline(1.0 / len(bins), color="0.45", lw=0.9, ls="--", label="uniform")
        figure.legend(loc="outside upper right")
        final.set(xlabel=f"probability at step {at[-1]:.0f}", xlim=(0.0, None))
        final.grid(visible=False, axis="y")
        _noise_axis(final, rows, noise)
        write_figure(figure, path)


def shades(probabilities: NDArray[np.float64]) -> dict[str, Any]:
    """Colour map and limits for probabilities (..., K) that show a uniform choice pale."""
    strong = min(1.0, 4.0 / probabilities.shape[-1])
    return {"cmap": "magma_r", "vmin": 0.0, "vmax": max(strong, float(probabilities.max()))}


def bars(path: str | Path, rows: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Write stacked bars, one per row from the top, showing its parts.

    Args:
        path: A PNG.
        rows: Name of a row -> its parts, all from 0; the same part has one colour in all of them.
        label: Label of the axis.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.55 * len(rows) + 1.1), dpi=150, layout="constrained")
        axes = figure.subplots()
        starts = np.zeros(len(rows))
        for number, part in enumerate(parts):
            widths = np.array([row.get(part, 0.0) for row in rows.values()])
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            axes.barh(list(rows), widths, left=starts, label=part, color=colour, height=0.65)
            starts += widths
        for row, total in enumerate(starts):
            axes.text(total, row, f" {total:,.0f}", va="center", color="0.3")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.1 * float(starts.max()))
        figure.legend(loc="outside upper center", ncols=len(parts), handlelength=1.0)
        write_figure(figure, path)


def _noise_axis(axes: Axes, rows: ArrayLike, noise_fraction: ArrayLike) -> None:
    """Label the rows that have a tick on the left axis with their noise fraction on the right.

    Args:
        axes: Its y axis has a tick at some of the rows.
        rows: (K,) where the timesteps lie.
        noise_fraction: (K,) share of noise at each of them, in [0, 1].
    """
    noise = dict(zip(np.asarray(rows).tolist(), np.asarray(noise_fraction).tolist(), strict=True))
    ticks = [tick for tick in axes.get_yticks() if tick in noise]
    right = axes.secondary_yaxis("right")
    right.set_yticks(ticks, [f"{noise[tick]:.2f}" for tick in ticks])
    right.set_ylabel("noise fraction")
    right.spines[:].set_visible(False)


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")
