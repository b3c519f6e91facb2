"""Mistakes in a study, or beside it, are one line that names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from tests.distill.studies.conftest import ARMS, Write

Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"baselines": ["scrath"]}, "baselines: 'scrath' is not an arm; did you mean 'scratch'?"),
        ({"arms": [ARMS[0], ARMS[0]]}, "two arms are named 'scratch'"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"seeds": [3, 3]}, "seeds: 3 appears twice in [3, 3]"),
        ({"arms": []}, "arms: list should have at least 1 item"),
        (
            {"arms": [{"name": "a/b"}]},
            "arms.0.name: must have only letters, digits and . + - _, and not start with . + -, "
            "got 'a/b'",
        ),
        ({"arms": [{"name": "a", "seed": 1}]}, "'arms.0.seed'; did you mean 'arms.0.seeds'?"),
        (
            {"arms": [{"name": "a", "overrides": ["policy.nam=ppo"]}], "baselines": []},
            "override 'policy.nam=ppo': unknown key 'policy.nam'; did you mean 'policy.name'?",
        ),
        (
            {"arms": [{"name": "a", "overrides": ["seed=3"]}], "baselines": []},
            "arm a: override 'seed=3': seed is set by the study itself",
        ),
        (
            {"arms": [{"name": "a", "take": "scratch"}], "baselines": []},
            "arm a: take: 'scratch' is not among its train.arms, distilled",
        ),
        (
            {"arms": [*ARMS, {"name": "v", "overrides": ["evaluate.split=val"]}]},
            "arm v: evaluate.split is 'val', but 'test' in arm scratch",
        ),
        ({"recipe": "none.yaml"}, "arm scratch: recipe {folder}/none.yaml: No such file"),
        ({"name": "../up"}, "; set name=, or rename the file, got '../up'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_study_is_named(
    changes: dict[str, Any], line: str, write: Write, refuse: Refuse, recipe: Path
) -> None:
    error = refuse("sweep", write(**changes))
    assert error.startswith(f"study {recipe.parent / 'small.yaml'}")
    assert line.format(recipe=recipe, folder=recipe.parent) in error
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--only", "unifrm"],
            "--only: 'unifrm' is not an arm of study {}; did you mean 'uniform'?",
        ),
        (["--seeds", "4"], "--seeds: 4 is not a seed of study {}; choose from 0, 1"),
        (["--seeds", "one"], "--seeds: a seed must be a whole number, got 'one'"),
        (["--seeds", "²"], "--seeds: a seed must be a whole number, got '²'"),
        (["--only", "uniform", "--seeds", "1"], "none of these arms has one of these seeds"),
        (["seed=3"], "study {}, arm scratch: override 'seed=3': seed is set by the study itself"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    words: list[str], line: str, write: Write, refuse: Refuse
) -> None:
    study = write()
    assert line.format(study) in refuse("sweep", study, *words)


def test_a_folder_that_is_no_run_is_named(write: Write, refuse: Refuse, recipe: Path) -> None:
    folder = recipe.parent / "runs/small/a2c-1"
    folder.mkdir(parents=True)
    (folder / ".config.yaml.tmp").touch()
    error = refuse("sweep", write())
    assert f"arm a2c: {folder} has no config.yaml and cannot be continued" in error


def test_a_file_whose_name_names_no_study_is_told_how_to_go_on(
    write: Write, refuse: Refuse
) -> None:
    study = write()
    study = study.rename(study.with_name("my study.yaml"))
    assert "name: must have only letters, digits and . + - _" in (line := refuse("sweep", study))
    assert "; set name=, or rename the file, got 'my study'" in line


def test_a_missing_study_is_named(refuse: Refuse) -> None:
    assert refuse("sweep", "none.yaml") == "study none.yaml: No such file or directory"


def test_all_recipes_are_tried_before_anything_is_trained(
    write: Write, refuse: Refuse, recipe: Path
) -> None:
    arms = [*ARMS, {"name": "typo", "overrides": ["policy.name=uniforn"]}]
    error = refuse("sweep", write(arms=arms))
    assert (
        f"study {recipe.parent / 'small.yaml'}, arm typo: policy.name: unknown name 'uniforn'"
        in error
    )
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_place_that_takes_no_results_is_named_before_any_recipe_is_tried(
    write: Write, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    study = write()
    monkeypatch.delattr("distill.commands.sweep.try_recipe")
    line = refuse("sweep", study, "--out", study, *more)
    assert line == (
        f"--out: cannot write to {study}: {study} is not a writable directory; choose another place"
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"cannot write to {study.parent / 'new'}: {study.parent} is not a writable" in refuse(
        "sweep", study, "--out", study.parent / "new", *more
    )
    assert refuse("sweep", study, *more).startswith("output: ")


def test_a_run_of_an_earlier_version_of_the_study_is_named(
    write: Write, refuse: Refuse, recipe: Path
) -> None:
    study = write(baselines=[], arms=ARMS[:1], seeds=[0])
    assert main(["sweep", str(study)]) == 0
    error = refuse("sweep", study, "train.lr=2e-3")
    written = recipe.parent / "runs/small/scratch-0/config.yaml"
    assert f"arm scratch: train.lr is 0.001 in {written}, but 0.002 in the study" in error
