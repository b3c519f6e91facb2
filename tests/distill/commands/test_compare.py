"""`distill compare`: scores and costs of several subjects in one table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from distill.cli import main
from distill.commands import compare
from distill.evaluation import footprint
from distill.evaluation.footprint import measure

SMALL = (
    *("--benchmark", "shapes", "--protocol", "linear", "evaluate.steps=1", "evaluate.lrs=[1e-3]"),
    *("data.options={size: 32, train: 16, val: 3, test: 5}", "evaluate.train_batch=4"),
)
QUICK = ("--batch", "2", "--rounds", "1")


def result_of(subject: str, out: Path) -> Path:
    assert main(["evaluate", subject, *SMALL, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"subject": 5}, "subject: input should be a valid string"),
        ({"size": "x"}, "size: must be a list, such as [x]"),
        ({"figures": {"miou": "x"}}, "figures.miou: input should be a valid number"),
        ({"figures": {}}, "figures: dictionary should have at least 1 item"),
    ],
)
def test_a_result_that_was_edited_wrongly_is_named(
    finished_run: Path, tmp_path: Path, refuse: Callable[..., str], change: Any, line: str
) -> None:
    written = result_of(str(finished_run), tmp_path / "a.json")
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    told = refuse("compare", written, finished_run, *SMALL, *QUICK)
    assert told.startswith(f"{written} is damaged: {line}")
    assert told.endswith("; name a result of `distill evaluate --out`")


def test_results_and_subjects_stand_in_one_table(
    teacher_folder: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = f"teacher:{teacher_folder},layers=up_blocks.0,timestep=100"
    written = result_of(teacher, tmp_path / "teacher.json")
    capsys.readouterr()
    out = tmp_path / "table"
    words = ["compare", str(written), str(finished_run), "--out", str(out), *SMALL, *QUICK]
    assert main(words) == 0
    told = capsys.readouterr().out
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["subject"] for row in rows] == [teacher, str(finished_run)]
    figures = json.loads((out / "compare.json").read_text())
    for row, of in zip(rows, figures, strict=True):
        assert row["miou"] == f"{100 * of['scores']['miou']:.1f}"
        assert float(row["parameters (M)"]) == pytest.approx(of["cost"]["parameters"] / 1e6, 0.01)
        assert of["cost"]["flops"] > 0
        speed, spread = row["images/s"].split(" ", 1)
        assert float(speed) == pytest.approx(of["cost"]["images_per_second"], 0.01)
        assert re.fullmatch(r"\(\S+ to \S+\)", spread)
        assert of["cost"]["memory"] > 0
    assert json.loads(written.read_text())["scores"] == figures[0]["scores"]
    table = (out / "table.md").read_text()
    assert table.splitlines()[2] in told
    assert table.count("\n|") == 4
    assert "note: labelled differs: 16, 6" in told
    assert "data.labelled" not in told
    with Image.open(out / "speed.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


class Widening:
    """A backbone that repeats an image's channels `factor` times: its memory is known."""

    name, layers, parameters = "widening", ("wide",), 7

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def flops(self, size: tuple[int, int]) -> int | None:
        return None

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        for _ in range(3):
            images.repeat(1, self.factor, 1, 1)  # and freed at once
        return {"wide": images.repeat(1, self.factor, 1, 1)}


def test_a_subject_without_recipe_is_scored_on_the_images_of_the_run_beside_it(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "timm:test_resnet:scratch", str(finished_run), "--protocol", "linear"]
    words += ["evaluate.steps=1", "evaluate.lrs=[1e-3]", "evaluate.train_batch=4", "seed=3"]
    assert main([*words, "--out", str(tmp_path / "table"), *QUICK]) == 0
    model, run = json.loads((tmp_path / "table" / "compare.json").read_text())
    assert model["images"] == run["images"]
    assert model["labelled"] == run["labelled"] == 6
    assert model["recipe"]["data"] == run["recipe"]["data"]
    assert model["recipe"]["student"]["model"] == "test_resnet"
    assert [one["recipe"]["seed"] for one in (model, run)] == [3, 3]  # overrides count more
    told = capsys.readouterr().out
    assert "differs" not in told
    # A result has a recipe too.
    result = tmp_path / "run.json"
    result.write_text(json.dumps(run))
    assert main([*words[:2], str(result), *words[3:], *QUICK]) == 0
    assert "differs" not in capsys.readouterr().out


def test_memory_is_each_backbones_own_whatever_was_measured_before() -> None:
    backbones: list[Any] = [Widening(16), Widening(2), Widening(16)]
    costs = measure(backbones, [(64, 64)] * 3, torch.device("cpu"), batch=2, rounds=1)
    image = 2 * 3 * 64 * 64 * 4 / 2**20
    assert [cost.memory / image for cost in costs] == pytest.approx([16, 2, 16], rel=0.05)
    assert costs[0].parameters == 7
    assert costs[0].flops is None


def test_speed_is_the_median_and_range_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the first takes 1, 4 and 2 seconds, one of the second 2, 8 and 2."""
    seconds = iter([0, 1, 1, 3, 3, 7, 7, 15, 15, 17, 17, 19])
    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    passes: list[int] = []

    class Noted(Widening):
        def maps(self, images: Tensor) -> dict[str, Tensor]:
            passes.append(self.factor)
            return super().maps(images)

    pair: list[Any] = [Noted(1), Noted(2)]
    costs = measure(pair, [(8, 8)] * 2, torch.device("cpu"), batch=8, rounds=3)
    assert passes[-6:] == [1, 2, 1, 2, 1, 2]
    speeds = [(cost.slowest, cost.images_per_second, cost.fastest) for cost in costs]
    assert speeds == [(2, 4, 8), (1, 4, 4)]


def notes(*results: dict[str, Any]) -> list[str]:
    return compare._differences(results)


def result(protocol: str = "linear", **sections: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {"data": {"augment": "crop"}, "evaluate": {"flip": False}, "seed": 0}
    return {"protocol": protocol, "size": [32, 32], "recipe": recipe | sections}


def test_whatever_of_the_setting_differs_is_named() -> None:
    assert notes(result(), result()) == []
    assert notes(result(), result(data={"augment": "crop", "root": "/elsewhere"})) == []
    other = result(evaluate={"flip": True, "lrs": [0.1]}, data={"augment": "none"}, seed=4)
    assert notes(result(evaluate={"flip": False, "lrs": [0.2]}), other) == [
        "note: data.augment differs: crop, none",
        "note: evaluate.flip differs: False, True",
        "note: evaluate.lrs differs: [0.2], [0.1]",
        "note: seed differs: 0, 4",
    ]
    assert notes(result(), result(data={"augment": "crop", "unlabelled": 12})) == []
    heads = [result("finetune", student={"head": head}) for head in ("fpn", "linear")]
    assert notes(*heads) == ["note: student.head differs: fpn, linear"]
    trained = [result("own", data={"labelled": labelled}) for labelled in (6, None)]
    assert notes(*trained) == ["note: data.labelled differs: 6, None"]


def test_other_images_are_refused_before_anything_is_fitted(
    finished_run: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(compare, "evaluate_subject", fitted)
    out = tmp_path / "deep" / "table"
    recipe = yaml.safe_load((finished_run / "config.yaml").read_text())
    recipe["data"]["options"] = {}
    result = {"subject": "timm:test_resnet", "protocol": "linear", "benchmark": "shapes"}
    result |= {"split": "test", "metric": "miou", "size": [32, 32], "figures": {"miou": 0.5}}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(result | {"recipe": recipe}))
    words = ("--protocol", "linear", "--out", out)
    line = refuse("compare", other, finished_run, *words)
    assert line == (
        f"compare: {finished_run} has data.options {{'size': 32, 'test': 5, 'train': 16, 'val': 3}}"
        f", but {other} has {{}}"
    )
    assert not (tmp_path / "deep").exists()
    assert f"{finished_run}-1 contains no" in refuse("compare", finished_run, f"{finished_run}-1")


def test_results_with_few_labels_and_a_single_choice_of_them_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--protocol", "label_efficient", "evaluate.labels=[4,all]", "evaluate.splits=2")
    words = [word for word in SMALL if word not in ("--protocol", "linear")]
    file = str(tmp_path / "few.json")
    assert main(["evaluate", "timm:test_resnet:scratch", *words, *few, "--out", file]) == 0
    written = json.loads(Path(file).read_text())
    assert None in written["intervals"].values()
    capsys.readouterr()
    assert main(["compare", file, file, *QUICK]) == 0
    assert "miou at 4" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["--protocol", "knn"], "--protocol knn"),
        (["--benchmark", "cifar10"], "--benchmark cifar10"),
        (["data.labelled=100"], "data.labelled=100"),
    ],
)
def test_what_has_no_effect_on_results_is_refused(
    tmp_path: Path, refuse: Callable[..., str], words: list[str], idle: str
) -> None:
    good = result_of("timm:test_resnet:scratch", tmp_path / "a.json")
    assert refuse("compare", good, good, *words).startswith(f"compare: {idle} has no effect")


def test_mistakes_are_one_line(
    finished_run: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = result_of("timm:test_resnet:scratch", tmp_path / "a.json")
    result = json.loads(good.read_text())
    (tmp_path / "b.json").write_text(json.dumps(result | {"split": "val"}))
    (tmp_path / "c.json").write_text("{}")
    for name, section, changes in (
        ("options", "data", {"options": {"size": 64}}),
        ("images", "evaluate", {"images": 2}),
    ):
        recipe = result["recipe"] | {section: result["recipe"][section] | changes}
        (tmp_path / f"{name}.json").write_text(json.dumps(result | {"recipe": recipe}))
    assert "options.json has data.options {'size': 64}, " in refuse(
        "compare", good, tmp_path / "options.json"
    )
    assert "images.json has evaluate.images 2, " in refuse(
        "compare", good, tmp_path / "images.json"
    )
    assert "two results or subjects" in refuse("compare", good)
    assert "b.json has split 'val'" in refuse("compare", good, tmp_path / "b.json")
    (tmp_path / "e.json").write_text(json.dumps(result | {"images": "x"}))
    line = refuse("compare", good, tmp_path / "e.json")
    assert "e.json and " in line
    assert "were scored on different images (data.root=None and " in line
    line = refuse("compare", good, tmp_path / "c.json")
    assert "c.json is damaged: subject is missing; name a result of" in line
    assert "d.json is missing or damaged" in refuse("compare", good, tmp_path / "d.json")
    assert "is not a writable directory" in refuse("compare", good, good, "--out", good)
    assert "no exported student" in refuse("compare", good, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.json").rename("lr=0.1.json")
    assert "lr=0.1.json has split 'val'" in refuse("compare", good, "lr=0.1.json")
