"""`distill sweep`: which runs a study comes down to, how they are trained, and what they give."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.cli import main
from distill.commands import train as command
from distill.studies.results import markdown, read_scores, study_results, write_results
from distill.studies.study import Cell, load_study, run_folder
from distill.training.loop import checkpoint_path
from tests.distill.studies.conftest import ARMS, Write, fake_runs

Interrupter = Callable[[str, int], None]
Refuse = Callable[..., str]


def test_every_arm_has_a_run_a_seed_with_its_overrides_last(write: Write, recipe: Path) -> None:
    study = load_study(write(), ["policy.bins=3", "name=other"])
    assert list(study.cells) == [
        ("scratch", 0), ("a2c", 0), ("uniform", 0), ("scratch", 1), ("a2c", 1),
    ]  # fmt: skip
    uniform, a2c = study.cells[Cell("uniform", 0)], study.cells[Cell("a2c", 1)]
    assert (uniform.policy.name, a2c.policy.name) == ("uniform", "a2c")
    assert {run.train.steps for run in study.cells.values()} == {2}
    assert {run.policy.bins for run in study.cells.values()} == {3}
    assert (uniform.seed, a2c.seed) == (0, 1)
    assert run_folder(a2c) == recipe.parent / "runs" / "other" / "a2c-1"
    assert study.takes == {"scratch": "scratch", "a2c": "distilled", "uniform": "distilled"}


def test_arms_of_one_recipe_have_one_run_a_seed(write: Write) -> None:
    arms = ["distilled", "scratch", "random_teacher"]
    study = load_study(
        write(
            overrides=[f"train.arms=[{', '.join(arms)}]"],
            baselines=["scratch"],
            arms=[{"name": arm, "take": arm} for arm in arms],
        )
    )
    assert {run.name for run in study.cells.values()} == {"distilled-0", "distilled-1"}
    assert study.takes == {arm: arm for arm in arms}
    assert study.cells[Cell("scratch", 1)] == study.cells[Cell("random_teacher", 1)]


def test_a_seed_may_stand_in_an_override(write: Write) -> None:
    overrides = ["data.split_seed={seed}", "teacher.cache=caches/{seed}"]
    study = load_study(write(overrides=overrides))
    for (_, seed), run in study.cells.items():
        assert (run.data.split_seed, run.teacher.cache) == (seed, f"caches/{seed}")


def test_the_main_arm_is_scored_where_none_is_named(write: Write) -> None:
    study = load_study(
        write(overrides=["train.arms=[scratch, distilled]"], arms=[{"name": "a"}], baselines=[])
    )
    assert study.takes == {"a": "distilled"}


def test_a_run_that_was_begun_keeps_its_folder_when_arms_are_added_before_it(write: Write) -> None:
    equal = [{"name": "first"}, {"name": "second"}]
    study = load_study(write(arms=equal, baselines=[]))
    assert {run.name for run in study.cells.values()} == {"first-0", "first-1"}
    (study.folder / "second-1").mkdir(parents=True)
    names = {run.name for run in load_study(study.path).cells.values()}
    assert names == {"first-0", "second-1"}


# What it finds


def test_a_run_that_only_fine_tuned_has_no_timestep(write: Write) -> None:
    study = load_study(write(arms=[{"name": "a2c"}], baselines=[]))
    fake_runs(study, {("a2c", 0): 0.5})
    path = run_folder(study.cells[Cell("a2c", 0)]) / "summary.json"
    path.write_text(json.dumps(checkpoint.read_json(path) | {"policy": None}))
    assert read_scores(study, {})[Cell("a2c", 0)].timestep is None


def test_results_have_paired_gains_with_intervals(write: Write, tmp_path: Path) -> None:
    study = load_study(write(seeds=[0, 1, 2]), ["policy.bins=3"])
    scores = {("scratch", 0): 0.50, ("scratch", 1): 0.60, ("a2c", 0): 0.52, ("a2c", 1): 0.64}
    fake_runs(study, scores | {("a2c", 2): 0.7, ("uniform", 0): 0.51})
    results = study_results(study, read_scores(study, {}))
    a2c = results["arms"]["a2c"]
    assert a2c["values"] == [0.52, 0.64, 0.7]
    assert a2c["miou"]["mean"] == pytest.approx(0.62)
    gain = a2c["gain_over_scratch"]  # 2 and 4 points of the seeds that both have
    assert gain["seeds"] == [0, 1]
    assert gain["values"] == pytest.approx([0.02, 0.04])
    # Student's t with one degree of freedom: 12.706 x the standard error, here 0.01.
    assert gain["mean"] == pytest.approx(0.03)
    assert gain["high"] - gain["mean"] == pytest.approx(0.12706, rel=1e-4)
    uniform = results["arms"]["uniform"]
    assert uniform["miou"] == {"mean": 0.51, "low": None, "high": None}
    assert "gain_over_uniform" not in uniform
    assert a2c["gain_over_uniform"]["low"] is None
    assert a2c["seconds"] == [10, 11, 12]
    assert results["runs"] == {"finished": 6, "planned": 7}
    assert results["command"] == f"distill sweep {study.path} policy.bins=3"
    table = markdown(results)
    told = "| a2c | 52.0, 64.0, 70.0 | 62.0 (39.2 to 84.8) | 3.0 (-9.7 to 15.7) | 1.0 (one seed) |"
    assert f"{told} 75 | 11 | 50 |" in table  # its policy's mean timestep, seconds, images/s
    assert "| uniform | 51.0 | 51.0 (one seed) | 1.0 (one seed) |  |  | 10 | 50 |" in table
    assert "7, 1 unfinished" in table
    assert "* uniform: `policy.name=uniform`" in table
    assert "all have the same labelled images, so that the intervals leave out" in table
    assert write_results(study, tmp_path, read_scores(study, {})) == table
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [{"commit": "0ther"}, {"hardware": "another machine"}])
def test_rows_of_another_commit_or_machine_than_a_baseline_are_marked(
    write: Write, other: dict[str, str]
) -> None:
    study = load_study(write(overrides=["train.arms=[distilled]", "data.split_seed={seed}"]))
    fake_runs(study, {("scratch", 0): 0.5, ("scratch", 1): 0.5, ("a2c", 0): 0.5, ("a2c", 1): 0.5})
    path = checkpoint_path(run_folder(study.cells[Cell("a2c", 1)]), "distilled")
    path = path.with_name("result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    table = markdown(study_results(study, read_scores(study, {})))
    assert "| a2c † | 50.0, 50.0 |" in table
    assert "| scratch | 50.0, 50.0 |" in table
    assert "† of another commit or machine than a baseline" in table
    assert "and which images have labels: the intervals are over all of these" in table


def test_seeds_of_another_teacher_at_the_same_path_are_refused(
    write: Write, refuse: Refuse, tmp_path: Path
) -> None:
    path = write()
    study = load_study(path)
    fake_runs(study, {("a2c", 0): 0.5, ("scratch", 0): 0.5, ("scratch", 1): 0.5})
    file = checkpoint_path(run_folder(study.cells[Cell("a2c", 0)]), "distilled")
    file = file.with_name("result.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": "0ther"}))
    line = refuse("sweep", str(path))
    assert (
        f"study {path}: arm a2c, seed 0 used teacher 0ther, but arm uniform, seed 0 used " in line
    )
    assert not run_folder(study.cells[Cell("a2c", 1)]).exists()


@pytest.mark.parametrize("change", [{"seconds": "x"}, {"hardware": 5}, {"scores": None}])
def test_a_run_with_wrong_results_is_named(
    write: Write, refuse: Refuse, change: dict[str, Any]
) -> None:
    path = write()
    study = load_study(path)
    fake_runs(study, {("scratch", 0): 0.5})
    folder = run_folder(study.cells[Cell("scratch", 0)])
    file = checkpoint_path(folder, "scratch").with_name("result.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    line = refuse("sweep", str(path), "--dry-run")
    assert line.startswith(
        f"{folder} is not a complete run ({file} is damaged: {next(iter(change))}: "
    )


def test_a_run_of_one_step_is_tried_too(write: Write) -> None:
    path = write(overrides=["train.arms=[distilled]", "train.steps=1"])
    assert main(["sweep", str(path), "--dry-run"]) == 0


# Training it


def test_a_study_is_trained_once_and_its_runs_are_ordinary_ones(
    write: Write, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = write(), tmp_path / "results"
    assert main(["sweep", str(study), "--out", str(out), "--seeds", "0", "policy.bins=3"]) == 0
    printed, progress = capsys.readouterr()
    assert "small: run 1 of 3, scratch-0, ETA" in progress
    assert "small: run 3 of 3, uniform-0, ETA" in progress
    results = json.loads((out / "small.json").read_text())
    assert list(results["arms"]) == ["scratch", "a2c", "uniform"]
    assert (out / "small.md").read_text() == printed.partition("\n\nwritten to")[0] + "\n"
    assert (out / "small.png").exists()

    runs = recipe.parent / "runs"
    alone = ["train.arms=[distilled]", "train.steps=2", "policy.name=uniform", "policy.bins=3"]
    assert main(["train", str(recipe), *alone]) == 0
    mine, theirs = (
        checkpoint.load(checkpoint_path(runs / name, "distilled"))["average"]
        for name in ("tiny", "small/uniform-0")
    )
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("last.pt")}
    capsys.readouterr()
    assert main(["sweep", str(study), "--out", str(out), "--seeds", "0", "policy.bins=3"]) == 0
    again, progress = capsys.readouterr()
    assert (again, progress) == (printed, "")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("last.pt")} == before


def test_an_interrupted_study_has_results_and_goes_on_where_it_stopped(
    write: Write,
    recipe: Path,
    interrupt: Interrupter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["train.arms=[distilled]", "train.steps=5"]
    study = write(seeds=[0], arms=ARMS[:2], baselines=["scratch"], overrides=overrides)
    runs = recipe.parent / "runs" / "small"
    main(["sweep", str(study), "--only", "scratch"])
    interrupt("distilled", 3)
    assert main(["sweep", str(study)]) == 130
    monkeypatch.undo()
    error = capsys.readouterr().err.splitlines()[-1]
    saved = f"distill: stopped in {runs / 'a2c-0'}, which is saved"
    assert error == f"{saved}; rerun the command to continue"
    assert list(json.loads((runs / "small.json").read_text())["arms"]) == ["scratch"]
    steps = [json.loads(x)["step"] for x in (runs / "a2c-0/metrics.jsonl").open()]
    assert main(["sweep", str(study)]) == 0
    resumed = [json.loads(x)["step"] for x in (runs / "a2c-0/metrics.jsonl").open()]
    assert (steps, resumed) == ([1, 2, 3], [1, 2, 3, 4, 5])
    assert list(json.loads((runs / "small.json").read_text())["arms"]) == ["scratch", "a2c"]


def test_a_study_stops_after_the_run_that_was_being_scored(
    write: Write, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, score = write(seeds=[0], arms=ARMS[:2], baselines=[]), command.score

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(command, "score", interrupted)
    assert main(["sweep", str(study)]) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "distill: stopped before a2c-0; rerun the command to continue"
    runs = recipe.parent / "runs" / "small"
    assert list(json.loads((runs / "small.json").read_text())["arms"]) == ["scratch"]


WILD = """
def wild(student, teacher):
    return (student - teacher).square().mean(dim=(1, 2, 3)) * float("nan")
"""
FAILING = """
def wild(student, teacher):
    raise RuntimeError("no way")
"""


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (WILD, "distilled: the feature loss is not finite at step 0"),
        (FAILING, "{place}: RuntimeError: no way"),
    ],
)
def test_a_run_that_fails_does_not_stop_the_others(
    write: Write,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own: str,
    words: str,
) -> None:
    # Two steps, with which recipes are tried, would find this one; others fail later.
    sys.modules.pop("own_later", None)
    (recipe.parent / "own_later.py").write_text(own)
    monkeypatch.syspath_prepend(recipe.parent)
    monkeypatch.setattr(
        "distill.commands.sweep._try_recipes", lambda study, cells, scores: dict.fromkeys("abc", 1)
    )
    arms = [{"name": "a", "overrides": ["pairs.0.loss=own_later:wild"]}, {"name": "b"}]
    study = write(arms=arms, baselines=[], seeds=[0])
    assert main(["sweep", str(study)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    runs = recipe.parent / "runs" / "small"
    assert error.startswith(
        f"distill: error: study {study}: 1 of 2 runs failed, the others finished: {runs / 'a-0'}: "
        + words.format(place=f"{recipe.parent / 'own_later.py'}:3")
    )
    assert list(json.loads((runs / "small.json").read_text())["arms"]) == ["b"]


def test_dry_run_says_what_would_be_trained_and_trains_nothing(
    write: Write, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs(load_study(write()), {("scratch", 0): 0.5})
    before = sorted(recipe.parent.rglob("*"))
    words = ["sweep", str(write()), "--dry-run", "--only", "scratch", "uniform", "policy.bins=3"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| scratch | scratch | 0 1 | 1 of 2 runs | 20 | `train.arms=[scratch]` |" in printed
    assert "| uniform | distilled | 0 | 1 of 1 runs |" in printed
    assert "a2c" not in printed
    assert "1 of 3 runs are done; the other 2 would be trained below" in printed
    assert sorted(recipe.parent.rglob("*")) == before


def test_dry_run_says_which_arms_are_done_and_which_are_in_the_runs_of_others(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"name": "both", "take": "distilled", "seeds": [0]}
    of_it = {"name": "its_scratch", "take": "scratch", "seeds": [0]}
    words = ["train.arms=[distilled, scratch]", "train.steps=2"]
    study = str(write(overrides=words, arms=[ARMS[0], both, of_it], baselines=[]))
    fake_runs(load_study(study), {("scratch", 0): 0.5, ("scratch", 1): 0.6})
    assert main(["sweep", study, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| scratch | scratch | 0 1 | done | 20 |" in printed
    assert "| both | distilled | 0 | 1 of 1 runs |" in printed
    assert "| its_scratch | scratch | 0 | in the runs of both |" in printed
    assert "2 of 3 runs are done; the other 1 would be trained below" in printed
    assert main(["sweep", study, "--dry-run", "--only", "scratch"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 runs are done; nothing was trained" in printed
