"""The run folder and its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from distill.errors import UserError
from distill.run_folder import RunLog, open_run_folder, read_metrics


def test_a_new_run_makes_its_folder(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "runs" / "a", resume=False)
    assert (tmp_path / "runs" / "a").is_dir()


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    open_run_folder(tmp_path, resume=False)


def test_a_run_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="exists; continue with --resume, or choose another name="):
        open_run_folder(tmp_path, resume=False)
    open_run_folder(tmp_path, resume=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run .*gone to resume"):
        open_run_folder(tmp_path / "gone", resume=True)


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create .*: Not a directory"):
        open_run_folder(tmp_path / "file" / "run", resume=False)


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot create run folder .*file: File exists"):
        open_run_folder(tmp_path / "file", resume=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_row_goes_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "distilled")
    log.scalars(3, {"loss/task": 0.5}, probabilities=[0.25, 0.75])
    log.distribution(3, "timesteps", torch.tensor([1, 2]))
    log.images(3, "seen", torch.zeros(2, 3, 4, 4))
    log.close()
    row = {"arm": "distilled", "step": 3, "loss/task": 0.5, "probabilities": [0.25, 0.75]}
    assert read_metrics(tmp_path) == [row]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "distilled"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/task")] == [(3, 0.5)]
    assert (events.Tags()["histograms"], events.Tags()["images"]) == (["timesteps"], ["seen"])


def test_rows_past_the_checkpoint_are_dropped_of_the_resumed_arm_alone(tmp_path: Path) -> None:
    rows = [{"arm": arm, "step": step} for arm in ("distilled", "scratch") for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLog(tmp_path, "scratch", start=2).close()
    assert [(row["arm"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("distilled", 1),
        ("distilled", 2),
        ("distilled", 3),
        ("scratch", 1),
        ("scratch", 2),
    ]


def test_a_last_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"arm": "a", "step": 1}\n{"arm": "a", "st')
    assert read_metrics(tmp_path) == [{"arm": "a", "step": 1}]
    RunLog(tmp_path, "a", start=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"arm": "a", "step": 1}\n'
