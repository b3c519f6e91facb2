"""`distill sweep --keep`: scores of runs that are gone, or were trained elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.cli import main
from distill.studies.results import read_scores, write_results
from distill.studies.study import Study, load_study
from tests.distill.studies.conftest import Write, fake_runs

Refuse = Callable[..., str]


def results_of(study: Study, scores: dict[tuple[str, int], float], folder: Path) -> Path:
    """Results of runs that are gone."""
    fake_runs(study, scores)
    write_results(study, folder, read_scores(study, {}))
    shutil.rmtree(study.folder)
    return folder / f"{study.config.name}.json"


def test_scores_from_elsewhere_are_taken_over_and_not_trained_again(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write()
    study = load_study(path)
    file = results_of(study, {("scratch", 0): 0.2, ("a2c", 0): 0.3, ("a2c", 1): 0.9}, tmp_path)
    fake_runs(study, {("a2c", 1): 0.4})  # a run counts for more than what was kept

    assert main(["sweep", str(path), "--keep", str(file), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "3 of 5 runs are done; the other 2 would be trained" in plan

    assert main(["sweep", str(path), "--keep", str(file), "--out", str(tmp_path)]) == 0
    results = json.loads(file.read_text())
    arms = results["arms"]
    assert results["runs"] == {"finished": 5, "planned": 5}
    assert arms["a2c"]["values"] == [0.3, 0.4]
    assert arms["a2c"]["gain_over_scratch"]["seeds"] == [0, 1]
    assert arms["a2c"]["mean_timesteps"] == [75, 75]
    assert arms["scratch"]["split_seeds"] == [0, 0]
    assert arms["scratch"]["values"][0] == 0.2
    assert {"c0ffee"} < {*arms["scratch"]["commits"]}
    assert not (study.folder / "scratch-0").exists()
    assert (study.folder / "scratch-1" / "summary.json").exists()


def test_scores_of_other_labelled_images_are_refused(
    write: Write, tmp_path: Path, refuse: Refuse
) -> None:
    path = write(overrides=["train.arms=[distilled]", "data.split_seed={seed}"])
    file = results_of(load_study(path), {("scratch", 1): 0.2}, tmp_path)
    refused = ["sweep", str(path), "--keep", str(file), "--dry-run"]
    line = refuse(*refused, "data.split_seed=5")
    assert f"--keep: {file} has other labelled images: data.split_seed of arm scratch, " in line
    assert "seed 1 was 1, but is 5 now" in line


def test_scores_of_other_settings_or_of_no_study_are_refused(
    write: Write, tmp_path: Path, refuse: Refuse
) -> None:
    path = write()
    file = results_of(load_study(path), {("scratch", 0): 0.2}, tmp_path)
    refused = ["sweep", str(path), "--keep", str(file), "--dry-run"]

    write(overrides=["train.arms=[distilled]", "train.steps=3"])
    assert "the study had ['train.arms=[distilled]', 'train.steps=2'], but has" in refuse(*refused)
    write(
        arms=[{"name": "scratch", "overrides": ["train.arms=[scratch]", "train.lr=1.0"]}],
        baselines=[],
    )
    assert "arm scratch had ['scratch', 'train.arms=[scratch]'], but has" in refuse(*refused)
    write()
    line = refuse(*refused, "train.lr=0.5")
    assert f"--keep: {file} has another recipe: train.lr was 0.001, but is 0.5 now" in line
    assert main([*refused, "train.log_every=3", "name=other"]) == 0  # changes no score
    results = json.loads(file.read_text())
    for value in (float("nan"), 99.0, "high", None):
        results["arms"]["scratch"]["values"] = [value]
        file.write_text(json.dumps(results))
        assert f"arm scratch: {value!r} is not a valid miou" in refuse(*refused)
    results["arms"]["scratch"]["values"] = [0.2]
    for key, wrong in (("seconds", [None]), ("commits", [1]), ("hardware", 5)):
        scratch = results["arms"]["scratch"] | {key: wrong}
        file.write_text(json.dumps(results | {"arms": {"scratch": scratch}}))
        assert f"--keep: {file} is not the JSON of a sweep" in refuse(*refused)
    file.write_text(json.dumps(results | {"metric": "speed"}))
    assert f"--keep: {file} is not the JSON of a sweep (metric is 'speed')" in refuse(*refused)
    for content in ("[]", "{", '{"arms": 1}'):
        file.write_text(content)
        assert f"--keep: {file} is not the JSON of a sweep" in refuse(*refused)
    file.unlink()
    assert "No such file" in refuse(*refused)
