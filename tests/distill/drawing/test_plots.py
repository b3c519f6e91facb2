"""Pictures are written whole, and show the colours and values they were given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.drawing import plots
from distill.errors import UserError


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == np.array(colour)).all(-1).mean())


def test_curves_take_every_row_a_run_may_have_written(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    rows = [
        {"step": step, "arm": arm, "loss/task": 1 / (step + 1), "lr": 0.1, "reward": None}
        for arm in ("scratch", "distilled")
        for step in range(60)
    ]
    rows += [{"step": 59, "arm": "distilled", "val/miou": 0.5, "loss/feature": float("nan")}]
    plots.curves(path, rows)
    picture = pixels(path)
    assert share(picture, (0x00, 0x72, 0xB2)) > 0
    assert share(picture, (0xD5, 0x5E, 0x00)) > 0


def test_curves_of_a_run_that_ended_at_once(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plots.curves(path, [])
    assert share(pixels(path), (0xFF, 0xFF, 0xFF)) == 1
    plots.curves(path, [{"step": 3, "loss/task": 1.0}])  # a point, as a line has no length
    assert share(pixels(path), (0x00, 0x72, 0xB2)) > 0


def test_running_mean_by_hand() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0])
    assert plots._running_mean(values, 1).tolist() == [1.5, 3.0, 4.0, 4.5]


@pytest.mark.parametrize("count", [1, 7])
def test_policy_draws_the_history_of_any_length(tmp_path: Path, count: int) -> None:
    path = tmp_path / "policy.png"
    history = np.tile([0.7, 0.2, 0.1], (count, 1))
    plots.policy(
        path,
        steps=10 * np.arange(count),
        history=history,
        timesteps=[0, 400, 999],
        noise_fraction=[0.01, 0.9, 1.0],
    )
    assert share(pixels(path), (0x8C, 0x29, 0x81)) > 0.01


def test_a_policy_that_stays_uniform_is_drawn_pale_with_the_legend_beside_its_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: figures.append(figure))
    plots.policy(
        tmp_path / "policy.png",
        steps=[1, 2, 3],
        history=np.full((3, 20), 0.05),
        timesteps=range(20),
        noise_fraction=np.linspace(0, 1, 20),
    )
    (figure,) = figures
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["uniform"]
    mesh = figure.axes[0].collections[0]
    assert mesh.cmap(mesh.norm(0.05))[:3] > (0.9, 0.6, 0.4)


def test_policy_refuses_a_history_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"history \(2, 3\)"):
        plots.policy(
            tmp_path / "policy.png",
            steps=[0, 1],
            history=np.ones((2, 3)) / 3,
            timesteps=[0, 1],
            noise_fraction=[0.0, 1.0],
        )


def test_a_picture_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was written"):
        plots.curves(tmp_path / "missing" / "curves.png", [])
