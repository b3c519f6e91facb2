"""Correspondence and depth through the command: students, timm models and teachers alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.cli import main
from distill.commands.evaluate import evaluate_subject

SHAPES = "data={benchmark: shapes, options: {size: 32, train: 16, val: 16, test: 40}}"
SMALL = ("evaluate.steps=3", "evaluate.lrs=[1e-3, 3e-2]", "evaluate.train_batch=4")
SCRATCH = "timm:test_resnet:scratch"


def evaluated(subject: object, protocol: str, *changes: str) -> dict[str, Any]:
    return evaluate_subject(str(subject), (SHAPES, *SMALL, *changes), protocol)[0]


@pytest.fixture
def subjects(finished_run: Path, teacher_folder: Path) -> tuple[str, ...]:
    """One of each kind."""
    teacher = f"teacher:{teacher_folder},layers=up_blocks.0,timestep=100"
    return f"{finished_run},layers=layer2+layer3", teacher, SCRATCH


def test_correspondence_takes_students_teachers_and_others(subjects: tuple[str, ...]) -> None:
    for subject in subjects:
        result = evaluated(subject, "correspondence", "evaluate.images=6")
        assert result["details"] == {"alpha": 0.1, "pairs": 6}
        assert result["metric"] == "pck_box"
        assert 0.0 <= result["scores"]["pck_box"] <= result["scores"]["pck_image"] <= 1.0
        assert result["scores"]["category"].keys() == {"cross", "square", "star", "triangle"}
        assert len(result["layers"]) == 1 + subject.count("+")
    again = evaluated(subjects[-1], "correspondence", "evaluate.images=6", "evaluate.batch=3")
    assert again["scores"] == result["scores"]


def test_depth_takes_students_teachers_and_others(subjects: tuple[str, ...]) -> None:
    for subject in subjects:
        result = evaluated(subject, "depth", "data.labelled=8")
        val = result["details"]["val"]
        assert min(val.values()) == val[str(result["details"]["lr"])]
        assert result["figures"] == result["scores"]
        assert list(result["figures"]) == ["rmse", "abs_rel", "delta1"]
        assert 0.0 < result["scores"]["rmse"] < 4.0
        assert result["labelled"] == 8
    assert evaluated(subjects[-1], "depth", "data.labelled=8")["scores"] == result["scores"]


def test_more_steps_lower_the_error_of_depth() -> None:
    few, many = (
        evaluated(f"{SCRATCH},layers=layer1", "depth", f"evaluate.steps={steps}")["scores"]["rmse"]
        for steps in (1, 60)
    )
    assert many < 0.95 * few


@pytest.mark.parametrize(
    ("protocol", "picture", "told"),
    [
        ("correspondence", "scores-matches.png", "pck_box  "),
        ("depth", "scores-depths.png", "rmse  "),
    ],
)
def test_the_command_writes_scores_and_a_picture(
    protocol: str,
    picture: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.json"
    words = [SCRATCH, "--protocol", protocol, "--benchmark", "shapes", SHAPES, *SMALL]
    assert main(["evaluate", *words, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert told in table
    assert f"protocol {protocol}" in table
    result = json.loads(out.read_text())
    assert result["protocol"] == protocol
    assert sorted(path.name for path in tmp_path.iterdir()) == [picture, "scores.json"]
    with Image.open(tmp_path / picture) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 100
    if protocol == "depth":  # an error is no share
        assert f"rmse                   {result['scores']['rmse']:.3f}" in table


@pytest.mark.parametrize("protocol", ["correspondence", "depth"])
def test_results_of_other_images_are_told_apart(protocol: str, tmp_path: Path, refuse: Any) -> None:
    words = []
    for test in (40, 41):
        changes = (f"data.options.test={test}", "evaluate.images=2", "evaluate.steps=1")
        result = evaluated(SCRATCH, protocol, *changes)
        result["recipe"]["data"]["options"] = {}  # as of two folders with the same options
        path = tmp_path / f"{test}.json"
        path.write_text(json.dumps(result))
        words.append(path)
    line = f"{words[1]} and {words[0]} were scored on different images"
    assert line in refuse("compare", *words)


def test_they_are_compared_with_what_they_cost(
    subjects: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table"
    words = [*subjects[1:], "--protocol", "depth", SHAPES, *SMALL, "--batch", "2", "--rounds", "1"]
    assert main(["compare", *words, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("rmse on shapes test")
    for result in json.loads((out / "compare.json").read_text()):
        assert f"| {result['figures']['rmse']:.3f} " in told
        assert f"| {100 * result['figures']['delta1']:.1f} " in told
    assert (out / "speed.png").exists()


def test_mistakes_are_one_line(refuse: Callable[..., str]) -> None:
    def refused(protocol: str, *changes: str) -> str:
        return refuse("evaluate", SCRATCH, "--protocol", protocol, *changes)

    assert (
        "'camvid' is one of benchmarks, not of correspondence; choose from shapes, spair"
        in refused("correspondence", "data.benchmark=camvid")
    )
    assert "did you mean 'nyuv2'?" in refused("depth", "data.benchmark=nyu2")
    assert "nyuv2: no folder given" in refused("depth", "data.benchmark=nyuv2")
    assert "nyuv2: no folder given" in refused(
        "depth", SHAPES, "data.benchmark=nyuv2", "data.options={}"
    )
    assert "looks at each image once and whole" in refused("depth", "evaluate.flip=true")
    assert "looks at each image once and whole" in refused("correspondence", "evaluate.window=32")
    assert "unknown key 'data.options.sise'" in refused("depth", "data.options.sise=32")
    assert "data.labelled: must be between 1 and 16" in refused("depth", SHAPES, "data.labelled=17")
