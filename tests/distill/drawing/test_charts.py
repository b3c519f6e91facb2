"""A report's pictures take whatever a run may have left."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from distill.drawing import charts
from distill.drawing.plots import ARM_COLOURS

AT = [0, 10, 20]


def shows(path: Path, colour: str) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return bool((pixels == np.array(wanted)).all(-1).any())


def test_scores_of_one_seed_of_several_and_of_none(tmp_path: Path) -> None:
    path = tmp_path / "scores.png"
    charts.scores(path, {"a $": {"x": [1.0]}, "b": {"x": [1.0, 2.0], "y": [0.5]}}, "IoU")
    assert shows(path, ARM_COLOURS[0])
    assert shows(path, ARM_COLOURS[1])


def test_panels_with_rows_that_are_missing_and_baselines_in_grey(tmp_path: Path) -> None:
    path = tmp_path / "panels.png"
    panels = {"scores": {"a $": [1.0, 2.0], "base": [0.5]}, "gain": {"a $": [0.5]}}
    charts.panels(path, panels, ["base"])
    assert shows(path, ARM_COLOURS[0])
    assert shows(path, ARM_COLOURS[5])


def test_a_floor_with_timesteps_that_were_never_measured(tmp_path: Path) -> None:
    path = tmp_path / "floor.png"
    floors = {"one": [0.1, None, 0.3], "two": [None, None, None]}
    charts.noise_floor(path, floors, [0, 10, 20], [0.0, 0.5, 1.0])
    assert shows(path, ARM_COLOURS[0])


def test_the_noise_fraction_stands_above_its_timestep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(charts, "write_figure", lambda figure, path: drawn.append(figure))
    charts.noise_floor(tmp_path / "floor.png", {"one": [0.1, None, None]}, AT, [0.0, 0.5, 1.0])
    charts.noise_floor(tmp_path / "floor.png", {"one": [0.1]}, AT[:1], [0.0])
    for figure in drawn:
        axes, above = figure.axes
        assert above.get_xlim() == axes.get_xlim()
        assert axes.get_xlim()[0] < 0
    assert drawn[0].axes[0].get_xlim()[1] > AT[-1]


def test_single_class_single_timestep_and_single_image(tmp_path: Path) -> None:
    charts.by_class(
        tmp_path / "class.png",
        distribution=[[1.0]],
        names=["only"],
        timesteps=[5],
        noise_fraction=[0.2],
    )
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    image[2] = 255
    charts.extremes(tmp_path / "image.png", [(image, "t = 1")], [(image, "t = 2\ncat")])
    assert shows(tmp_path / "image.png", "#0000ff")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class.png", "image.png"]
