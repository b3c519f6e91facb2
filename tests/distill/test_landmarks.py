"""Landmarks: heat maps and back, points that move with their image, the scores, a whole run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from distill.augmentation import augmentation, mirror_points
from distill.benchmarks.wflw import wflw
from distill.cli import main
from distill.errors import UserError
from distill.landmarks import LandmarkTally, heat_maps, landmark_loss, peaks
from distill.matching.losses import task_loss
from distill.metrics import in_points, more_is_better
from distill.studies.comparison import gains
from distill.studies.results import markdown, read_scores, study_results
from distill.studies.study import Cell, load_study, run_folder
from tests.distill.benchmarks import faces

# Heat maps


@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_heat_maps_and_back_cost_less_than_a_tenth_of_a_pixel(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    points = 0.1 + 0.8 * torch.rand(1, 50, 2, generator=generator)
    maps = heat_maps(points, size)
    assert maps.shape == (1, 50, *size)
    pixels = (peaks(maps[0]) - points[0]).abs() * 64  # of an image of 64 px
    assert pixels.max() < 0.1
    # However high the peaks are, and on a background that is not quite 0
    assert ((peaks(0.3 * maps[0] - 0.01) - points[0]).abs() * 64).max() < 1


def test_a_map_has_its_peak_at_the_position_that_holds_the_point() -> None:
    (found,) = heat_maps(torch.tensor([[[0.625, 0.125]]]), (4, 4))[0]
    assert divmod(int(found.argmax()), 4) == (0, 2)
    assert found[0, 2] == 1
    assert found[0, 1] == pytest.approx(math.exp(-1 / (2 * 1.5**2)))
    torch.testing.assert_close(peaks(found[None]), torch.tensor([[0.625, 0.125]]))


def test_empty_and_single_maps_have_a_peak_all_the_same() -> None:
    assert peaks(torch.zeros(2, 4, 4)).isfinite().all()
    assert peaks(-torch.ones(1, 1, 1)).tolist() == [[0.5, 0.5]]


def test_the_loss_is_1_for_nothing_and_0_for_the_truth() -> None:
    points = torch.full((2, 3, 2), 0.5)
    maps = heat_maps(points, (32, 32))
    losses = task_loss(torch.stack([maps[0], 0 * maps[1]]), points)
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0]))


def test_the_loss_of_coordinates_is_their_mean_distance() -> None:
    points = torch.tensor([[[0.5, 0.5], [0.5, 0.8]], [[1.0, 0.0], [1.0, 0.0]]])
    outputs = torch.tensor([[0.0, 0.0, 0.6, -0.2], [1.0, -1.0, 1.0, -1.0]])
    # The second point is found at (0.8, 0.4): 0.3 and 0.4 away
    torch.testing.assert_close(landmark_loss(outputs, points), torch.tensor([0.25, 0.0]))


# Augmentation


def dots(points: Tensor, size: int) -> Tensor:
    """Two dots of one colour each, (3, size, size) uint8, their centres at the points."""
    x = torch.arange(size) + 0.5
    image = torch.full((3, size, size), 90.0)
    for channel, (across, down) in enumerate(points * size):
        near = torch.exp(-((x[None] - across) ** 2 + (x[:, None] - down) ** 2) / 8)
        image[channel] += 160 * near
    return image.round().to(torch.uint8)


def centre(channel: Tensor) -> Tensor:
    """Where the dot of a channel is, as shares of the side."""
    weight = channel.float() - channel.float().median()
    weight = weight.where(weight > 40, 0)
    x = (torch.arange(len(channel)) + 0.5) / len(channel)
    return torch.stack([(weight.sum(0) * x).sum(), (weight.sum(1) * x).sum()]) / weight.sum()


@pytest.mark.parametrize("strength", ["flip", "crop"])
def test_points_move_with_their_image(strength: str) -> None:
    points = torch.tensor([[0.35, 0.4], [0.7, 0.55]])
    image = dots(points, 96)
    change = augmentation(strength, "landmarks", (96, 96), mirrored=(1, 0))
    flips = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(12):
            changed, moved = change(image, points)
            assert changed.dtype == torch.uint8
            assert changed.shape == image.shape
            assert type(changed) is type(moved) is Tensor
            # In the mirror the first dot is the right one, which is the second point.
            places = [int((moved - centre(changed[c])).norm(dim=1).argmin()) for c in (0, 1)]
            flips.add(places[0])
            for place, channel in zip(places, changed[:2], strict=True):
                assert ((moved[place] - centre(channel)) * 96).norm() < 0.5
            assert sorted(places) == [0, 1]
    assert flips == {0, 1}


def test_colours_and_missing_points_change_nothing_of_that() -> None:
    points = torch.tensor([[0.3, 0.4], [0.7, 0.6]])
    image = dots(points, 32)

    def changed(strength: str, target: Any) -> tuple[Tensor, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return augmentation(strength, "landmarks", (32, 32), mirrored=(1, 0))(image, target)

    bare, target = changed("strong", 255)
    labelled, moved = changed("strong", points)
    assert target == 255
    assert torch.equal(bare, labelled)
    assert torch.equal(moved, changed("crop", points)[1])
    assert not torch.equal(bare, changed("crop", points)[0])


def test_a_mirrored_point_is_the_other_one() -> None:
    points = torch.tensor([[0.25, 0.5], [0.5, 0.125]])
    assert mirror_points(points, (1, 0)).tolist() == [[0.5, 0.125], [0.75, 0.5]]


# Scores


def test_errors_are_scored_as_by_hand() -> None:
    benchmark: Any = SimpleNamespace(name="faces", eyes=(0, 1))
    tally = LandmarkTally(benchmark, "cpu")
    truth = torch.tensor([[0.2, 0.5], [0.7, 0.5], [0.5, 0.8]])  # half a side from eye to eye
    for off in (0.0, 0.02, 0.06):  # of one point: 0, 0.04 / 3 and 0.12 of the unit if of all
        guess = truth.clone()
        guess[:, 1] += off
        tally.update(torch.empty(0), guess, truth)
    torch.testing.assert_close(torch.stack(tally.each), torch.tensor([0.0, 0.04, 0.12]))
    scores = tally.scores()
    assert scores["nme"] == pytest.approx(0.16 / 3)
    assert scores["failure_rate"] == pytest.approx(1 / 3)
    # The share of faces below an error: 1/3 up to 0.04, 2/3 up to 0.1
    assert scores["auc"] == pytest.approx((0.04 / 3 + 0.06 * 2 / 3) / 0.1)
    # As if two processes had counted the same
    assert tally.scores(lambda sums: 2 * sums) == pytest.approx(scores)


def test_a_split_without_faces_is_refused() -> None:
    benchmark: Any = SimpleNamespace(name="faces", eyes=(0, 1))
    with pytest.raises(UserError, match="faces: the split has no faces to score"):
        LandmarkTally(benchmark, "cpu").scores()


def test_a_lower_error_is_a_gain() -> None:
    assert gains("nme", {0: 0.05, 1: 0.07}, {0: 0.08}) == pytest.approx({0: 0.03})
    assert gains("miou", {0: 0.5}, {0: 0.3}) == pytest.approx({0: 0.2})
    assert max([0.3, 0.1, 0.2], key=lambda value: more_is_better("nme", value)) == 0.1
    assert in_points("nme") == "in points (lower is better)"
    assert in_points("miou") == "in points"


# Whole commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wflw")
    faces.wflw(root, train=80, test=24, size=64)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, data: Path) -> Path:
    """The folder of a run on drawn faces; for reading only."""
    folder = tmp_path_factory.mktemp("runs")
    tree = {
        "name": "faces",
        "output": str(folder),
        "device": "cpu",
        "data": {"benchmark": "wflw", "root": str(data), "size": [32, 32], "augment": "flip"},
        "teacher": {"path": str(teacher_folder), "dtype": "float32"},
        "student": {"model": "test_resnet", "head_layers": ["layer1", "layer2", "layer3"]},
        "pairs": [{"student": "layer2", "teacher": "up_blocks.0"}],
        "policy": {"bins": 3},
        "train": {
            "arms": ["distilled"],
            "steps": 80,
            "batch": 12,
            "unlabelled_batch": 4,
            "lr": 1e-2,
            "ema": 0.9,
            "precision": "no",
            "evaluate_every": 40,
            "feature_weight": 0.1,
        },
    }
    path = folder / "faces.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path)]) == 0
    return folder / "faces"


def nme_of_the_mean_face(data: Path) -> float:
    benchmark = wflw(str(data))
    train, test = (
        torch.stack([points for _, points in (examples[i] for i in range(len(examples)))])
        for examples in (benchmark.dataset("train"), benchmark.dataset("test"))
    )
    unit = (test[:, 60] - test[:, 72]).norm(dim=1)
    return float(((test - train.mean(0)).norm(dim=2).mean(1) / unit).mean())


def test_a_short_run_is_far_better_than_the_mean_face(run: Path, data: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["benchmark"]) == ("landmarks", "wflw")
    scores = summary["metrics"]["distilled"]
    assert scores["nme"] < 0.6 * nme_of_the_mean_face(data)
    assert summary["policy"]["mean_reward"] < 0  # minus a distance
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["val/nme"] < 0.2 for row in rows if "val/nme" in row] == [True]
    assert (run / "student" / "head.safetensors").exists()
    with Image.open(run / "predictions.png") as picture:
        assert picture.width > 1000  # four faces in the first of two rows


def test_evaluate_scores_and_draws_the_points(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--out", str(tmp_path / "scores.json")]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    summary = json.loads((run / "summary.json").read_text())["metrics"]["distilled"]
    assert result["scores"] == pytest.approx(summary)
    assert result["metric"] == "nme"
    assert f"{'nme':22} {100 * summary['nme']:5.1f}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["scores-overlays.png"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evaluate", "RUN", "--protocol", "knn"], "wflw has landmarks, but knn votes on whole"),
        (["evaluate", "RUN", "evaluate.window=16"], "wflw has landmarks, but windows are for"),
        (["evaluate", "RUN", "evaluate.flip=true"], "evaluate.flip: landmarks are not averaged"),
        (["evaluate", "RUN", "evaluate.scales=[1.0,1.5]"], "evaluate.scales: landmarks are"),
        (
            ["export", "RUN", "--format", "onnx"],
            "can be exported whole only as timm or hub; choose one of",
        ),
        (["predict", "RUN", "RUN", "--out", "OUT"], "finds landmarks, but predict writes masks"),
        (["probe", "RUN/config.yaml", "--out", "OUT"], "wflw has landmarks, but linear probes"),
        (["train", "RUN/config.yaml", "name=x", "output=OUT", "teacher.labels=true"], "a set of"),
    ],
)
def test_what_landmarks_have_no_place_in_is_refused(
    words: list[str], line: str, run: Path, tmp_path: Path, refuse_words: Callable[..., str]
) -> None:
    given = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    assert line in refuse_words(given)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def refuse_words(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a command is refused."""

    def check(words: list[str]) -> str:
        assert main(words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return check


def with_scratch(run: Path, folder: Path, nme: float) -> Path:
    """A copy of a run, which has trained a student from scratch too."""
    shutil.copytree(run, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"]["scratch"] = {"nme": nme}
    (folder / "summary.json").write_text(json.dumps(summary))
    result = json.loads((folder / "checkpoints/distilled/result.json").read_text())
    result |= {"scores": {"nme": nme}, "policy": None, "noise_floor": None}
    (folder / "checkpoints/scratch").mkdir()
    (folder / "checkpoints/scratch/result.json").write_text(json.dumps(result))
    return folder


def test_a_report_says_that_the_lower_error_is_better(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = json.loads((run / "summary.json").read_text())["metrics"]["distilled"]["nme"]
    folder = with_scratch(run, tmp_path / "run", mine + 0.025)
    assert main(["report", str(folder)]) == 0
    assert "gain over scratch    +2.5 points" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "Distilled is 2.5 points better than scratch" in page
    assert "NME in points (lower is better) on wflw" in page
    assert "distill probe" not in page


def test_a_study_counts_a_lower_error_as_gain(run: Path, tmp_path: Path) -> None:
    tree = {
        "recipe": str(run / "config.yaml"),
        "seeds": [0, 1],
        "baselines": ["scratch"],
        "overrides": [f"output={tmp_path}", "train.arms=[distilled, scratch]"],
        "arms": [{"name": arm, "take": arm} for arm in ("scratch", "distilled")],
    }
    path = tmp_path / "faces.yaml"
    path.write_text(yaml.safe_dump(tree))
    study = load_study(path, [])
    for seed in (0, 1):
        folder = run_folder(study.cells[Cell("distilled", seed)])
        copy = with_scratch(run, folder, 0.30 + 0.02 * seed)
        result = copy / "checkpoints/distilled/result.json"
        content = json.loads(result.read_text()) | {"scores": {"nme": 0.25}}
        result.write_text(json.dumps(content))
    table = markdown(study_results(study, read_scores(study, {})))
    assert table.startswith("NME in points (lower is better) on wflw test: means over seeds")
    row = next(line for line in table.splitlines() if line.startswith("| distilled |"))
    assert row.split(" | ")[1:3] == ["25.0, 25.0", "25.0 (25.0 to 25.0)"]
    assert row.split(" | ")[3].startswith("6.0 (")


def test_compare_says_which_direction_is_better(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    assert main(["evaluate", str(run), "--out", str(path)]) == 0
    words = ["compare", str(path), str(path), "--batch", "2", "--rounds", "1"]
    assert main([*words, "--out", str(tmp_path / "table")]) == 0
    assert "NME in points (lower is better) on wflw test" in capsys.readouterr().out


def test_a_linear_head_is_chosen_by_its_lowest_error(run: Path, tmp_path: Path) -> None:
    words = ["--protocol", "linear", "evaluate.steps=8", "evaluate.lrs=[1e-9, 1e-2]"]
    assert (
        main(["evaluate", f"{run},layers=layer1", *words, "--out", str(tmp_path / "l.json")]) == 0
    )
    details = json.loads((tmp_path / "l.json").read_text())["details"]
    assert details["val"]["0.01"] < details["val"]["1e-09"]
    assert details["lr"] == 0.01
