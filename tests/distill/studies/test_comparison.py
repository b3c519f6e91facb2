"""Runs that differ in the seed alone go together; differences are paired by seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import UserError
from distill.reporting.results import results
from distill.reporting.summary import compare
from distill.studies.comparison import (
    FinishedRun,
    baselines,
    compare_groups,
    figures,
    group_runs,
    main_arm,
    read_run,
    taught_arm,
)


def copy_run(run: Path, folder: Path, score: dict[str, float], **changes: Any) -> FinishedRun:
    """The run once more, with other scores and keys of the recipe (`policy__bins=5`)."""
    shutil.copytree(run, folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    summary["seed"] = tree["seed"]
    for arm, value in score.items():
        summary["metrics"][arm]["miou"] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "summary.json").write_text(json.dumps(summary))
    return read_run(folder)


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> list[FinishedRun]:
    """Seeds 0 and 1 of one recipe, and 1 and 2 of another."""
    return [
        copy_run(finished_run, tmp_path / "a0", {"distilled": 0.30, "scratch": 0.20}, name="a0"),
        copy_run(
            finished_run,
            tmp_path / "a1",
            {"distilled": 0.34, "scratch": 0.22},
            **{"seed": 1, "name": "a1", "data__workers": 2, "train__log_every": 7},
        ),
        *(
            copy_run(
                finished_run,
                tmp_path / f"b{seed}",
                {"distilled": 0.40, "scratch": 0.10},
                **{"seed": seed, "policy__name": "uniform"},
            )
            for seed in (1, 2)
        ),
    ]


def test_runs_that_differ_in_seed_and_place_alone_are_one_group(runs: list[FinishedRun]) -> None:
    groups = group_runs(runs)
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [1, 2]]
    assert [group.label for group in groups] == ["policy.name=a2c", "policy.name=uniform"]


def test_groups_of_many_differences_are_called_by_their_first_runs(
    finished_run: Path, tmp_path: Path
) -> None:
    other = copy_run(
        finished_run, tmp_path / "other", {}, name="other",
        **{"train__lr": 0.5, "policy__name": "uniform", "train__ema": 0.1},
    )  # fmt: skip
    assert [group.label for group in group_runs([read_run(finished_run), other])] == [
        "tiny",
        "other",
    ]


def test_gains_are_paired_by_seed(runs: list[FinishedRun]) -> None:
    groups = group_runs(runs)
    found = figures(groups[0], groups)
    assert found["seeds"] == [0, 1]
    assert found["arms"]["distilled"]["values"] == [0.30, 0.34]
    # gains 0.10 and 0.12: mean 0.11, deviation 0.014142, t(0.975, 1) = 12.7062
    gain = found["arms"]["distilled"]["gain_over_scratch"]
    assert gain == pytest.approx({"mean": 0.11, "low": -0.017062, "high": 0.237062}, abs=1e-6)
    assert "gain_over_scratch" not in found["arms"]["scratch"]


def of_one_arm(run: Path, folder: Path, arm: str, score: float, **changes: Any) -> FinishedRun:
    """The run as it would be with one of its arms alone."""
    copy_run(run, folder, {arm: score}, train__arms=[arm], **changes)
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"] = {arm: summary["metrics"][arm]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return read_run(folder)


def test_controls_that_are_runs_of_their_own_are_paired_with(
    finished_run: Path, tmp_path: Path
) -> None:
    runs = [
        of_one_arm(finished_run, tmp_path / f"{name}{seed}", arm, score, seed=seed, **policy)
        for name, arm, policy, scores in (
            ("scratch", "scratch", {}, (0.20, 0.22)),
            ("a2c", "distilled", {}, (0.30, 0.34)),
            ("uniform", "distilled", {"policy__name": "uniform"}, (0.25, 0.27)),
        )
        for seed, score in enumerate(scores)
    ]
    groups = group_runs(runs)
    arms = [of["arms"] for of in compare_groups(groups)["groups"]]
    assert arms[1]["distilled"]["gain_over_scratch"]["mean"] == pytest.approx(0.11)
    assert arms[2]["distilled"]["gain_over_scratch"]["mean"] == pytest.approx(0.05)
    assert "gain_over_scratch" not in arms[0]["scratch"]
    section = results(groups, tmp_path)
    (of_uniform,) = [finding for finding in section.findings if "uniform" in finding.about]
    assert "Distilled is above scratch by 5.0 (5.0 to 5.0) points" in of_uniform.text
    again = of_one_arm(finished_run, tmp_path / "again", "scratch", 0.1, teacher__path="other")
    unsure = compare_groups(group_runs([*runs, again]))["groups"]
    assert "gain_over_scratch" not in unsure[1]["arms"]["distilled"]  # over which of the two?


@pytest.mark.parametrize(
    ("arm", "change", "shared"),
    [
        ("scratch", {"train__feature_weight": 2.0}, True),
        ("scratch", {"teacher__path": "other"}, True),
        ("scratch", {"data__labelled": 5}, False),
        ("scratch", {"train__steps": 500}, False),
        ("scratch", {"student__model": "resnet50"}, False),
        ("random_teacher", {"policy__name": "uniform"}, True),
        ("random_teacher", {"teacher__path": "other"}, False),
        ("random_teacher", {"train__feature_weight": 2.0}, False),
    ],
)
def test_controls_are_those_of_a_recipe_that_differs_in_nothing_they_depend_on(
    finished_run: Path, tmp_path: Path, arm: str, change: dict[str, Any], shared: bool
) -> None:
    control = of_one_arm(finished_run, tmp_path / "control", "scratch", 0.2, **change)
    if arm == "random_teacher":
        control.summary["metrics"] = {arm: control.summary["metrics"].pop("scratch")}
    groups = group_runs([control, of_one_arm(finished_run, tmp_path / "taught", "distilled", 0.3)])
    assert baselines(groups[1], groups) == ({arm: {0: 0.2}} if shared else {})


def test_runs_of_another_teacher_at_the_same_path_are_another_recipe(
    runs: list[FinishedRun],
) -> None:
    fingerprint = runs[0].results["distilled"]["teacher"]
    assert len(fingerprint) == 64
    runs[1].results["distilled"]["teacher"] = "0ther"
    groups = group_runs(runs)
    assert [len(group.runs) for group in groups] == [1, 1, 2]
    assert [group.label for group in groups] == ["a0", "a1", "tiny"]  # by recipe two are alike


def test_differences_to_the_first_recipe_are_of_common_seeds(runs: list[FinishedRun]) -> None:
    first, second = compare_groups(group_runs(runs))["groups"]
    assert "difference_to_first" not in first["arms"]["distilled"]
    found = second["arms"]["distilled"]["difference_to_first"]  # seed 1 alone is common
    assert found == {"mean": pytest.approx(0.06), "low": None, "high": None}
    first, second = compare_groups(group_runs(runs[:3]))["groups"]
    assert second["arms"]["distilled"]["miou"] == {"mean": 0.40, "low": None, "high": None}
    first, second = compare_groups(group_runs([runs[0], runs[2]]))["groups"]
    assert second["arms"]["distilled"]["difference_to_first"] is None  # no seed in common


def test_table_of_one_recipe(runs: list[FinishedRun], tmp_path: Path) -> None:
    text = compare(group_runs(runs[:2]), str(tmp_path / "out.json"))
    assert text.splitlines()[:5] == [
        "miou in points on shapes test, seeds 0, 1: mean (95% confidence interval)",
        "",
        "| arm | each seed | mean | gain over scratch, paired |",
        "|---|---|---|---|",
        "| distilled | 30.0, 34.0 | 32.0 (6.6 to 57.4) | 11.0 (-1.7 to 23.7) |",
    ]
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == [
        *("benchmark", "split", "metric", "seeds", "arms", "commits", "hardware"),
    ]


def test_table_of_several_recipes(runs: list[FinishedRun], tmp_path: Path) -> None:
    text = compare(group_runs(runs), str(tmp_path / "out.json"))
    assert "seeds 0, 1, 2:" in text
    assert "| policy.name=uniform | distilled | 40.0, 40.0 | 40.0 (40.0 to 40.0) |" in text
    groups = json.loads((tmp_path / "out.json").read_text())["groups"]
    assert [group["label"] for group in groups] == ["policy.name=a2c", "policy.name=uniform"]


def test_runs_on_other_images_are_refused(runs: list[FinishedRun]) -> None:
    folder = runs[1].folder
    path = folder / "checkpoints" / "distilled" / "result.json"
    result = json.loads(path.read_text())
    assert len(result["data"]["train"]) == len(result["data"]["scored"]) == 64
    other = result["data"] | {"train": "x"}  # another training set is another recipe
    path.write_text(json.dumps(result | {"data": other}))
    assert [len(group.runs) for group in group_runs([runs[0], read_run(folder)])] == [1, 1]
    path.write_text(json.dumps(result | {"data": other | {"scored": "y"}}))
    with pytest.raises(
        UserError, match=r"a1 and .*a0 .* scored on different images \(data.root=None and "
    ):
        group_runs([runs[0], read_run(folder)])


def test_a_seed_given_twice_is_refused(finished_run: Path) -> None:
    with pytest.raises(UserError, match="two runs have the same recipe and seed"):
        group_runs([read_run(finished_run), read_run(finished_run)])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"evaluate__split": "val"}, r"cannot be compared: evaluate.split is val and test"),
        ({"evaluate__images": 3}, r"evaluate.images is 3 and None"),
        ({"evaluate__flip": True}, r"evaluate.flip is True and False"),
        (
            {"data__options": {"size": 32, "test": 6}},
            r"data.options is {'size': 32, 'test': 6} and ",
        ),
        ({"data__split_seed": 1, "name": "b"}, r"data.split_seed is 1 and 0"),
    ],
)
def test_runs_that_were_scored_on_other_images_are_refused(
    finished_run: Path, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    other = copy_run(finished_run, tmp_path / "other", {}, **change)
    with pytest.raises(UserError, match=line):
        group_runs([read_run(finished_run), other])


def test_seeds_may_draw_labels_and_keep_features_of_their_own(
    finished_run: Path, tmp_path: Path
) -> None:
    runs = [
        copy_run(
            finished_run,
            tmp_path / f"s{seed}",
            {},
            **{"seed": seed, "data__split_seed": seed, "teacher__cache": f"caches/{seed}"},
        )
        for seed in (0, 1)
    ]
    assert len(group_runs(runs)) == 1
    bare = copy_run(finished_run, tmp_path / "bare", {}, seed=1, data__split_seed=1)
    assert len(group_runs([*runs, bare])) == 2


def test_groups_of_one_name_are_called_by_their_folders(finished_run: Path, tmp_path: Path) -> None:
    many = {"train__lr": 0.5, "policy__name": "uniform", "train__ema": 0.1}
    runs = [
        copy_run(finished_run, tmp_path / "a" / "run", {}),
        copy_run(finished_run, tmp_path / "b" / "run", {}, **many),
    ]
    labels = [group.label for group in group_runs(runs)]
    assert labels == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_one_main_arm_and_one_taught_arm() -> None:
    assert main_arm(["scratch", "distilled"]) == "distilled"
    assert main_arm(["scratch", "random_teacher"]) == "scratch"
    policy = {"policy": {"timesteps": [0]}}
    assert taught_arm({"scratch": {}, "random_teacher": policy}) == "random_teacher"
    assert taught_arm({"random_teacher": policy, "distilled": policy}) == "distilled"
    assert taught_arm({"scratch": {}}) is None


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no summary.json; name a finished run folder"):
        read_run(tmp_path)
