"""The run folder, its log, the progress display and the clean stop."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from distill import tracking
from distill.errors import UserError
from distill.tracking import (
    Progress,
    RunLog,
    commit,
    hardware,
    open_run_folder,
    read_metrics,
    stop_on_signals,
)


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


def test_stops_within_each_other_are_one() -> None:
    with stop_on_signals() as outer:
        with stop_on_signals() as first:
            os.kill(os.getpid(), signal.SIGTERM)
        with stop_on_signals() as second:
            assert [bool(stop) for stop in (outer, first, second)] == [True] * 3
    with stop_on_signals() as later:
        assert not later


def test_without_a_terminal_the_last_step_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    stream = io.StringIO()
    with Progress("distilled", 2, stream=stream) as progress:
        progress.update(10, {"task": 0.5}, waited=0.0)
        assert stream.getvalue() == ""
        progress.update(10, {"task": 0.25}, waited=0.5)
    assert stream.getvalue() == (
        "distilled 2/2: 10 images/s, task 0.250, waiting for data 25%, ETA 00:00\n"
    )
    assert progress.rate == 10.0


def test_plain_lines_come_now_and_then_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    stream = io.StringIO()
    with Progress("a", 20, start=16, stream=stream) as progress:
        progress.update(6, {})
    # One of four steps took 12 s.
    assert stream.getvalue() == "a 17/20: 0 images/s, ETA 00:36\n"


def test_what_is_soon_done_may_go_without_a_line() -> None:
    stream = io.StringIO()
    with Progress("scoring", 1, stream=stream, last=False) as progress:
        progress.update(10, {})
    assert stream.getvalue() == ""


def test_a_terminal_sees_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("distilled", 2, stream=stream) as progress:
        progress.update(10, {"task": 0.5})
        progress.update(10, {"task": 0.25})
    last = stream.getvalue().split("\r")[-1]
    assert re.search(r"distilled: 100%.* 2/2 .*images/s, task 0\.250", last)


def test_only_the_first_process_shows_progress() -> None:
    stream = io.StringIO()
    with Progress("distilled", 1, stream=stream, show=False) as progress:
        progress.update(10, {"task": 0.5})
    assert stream.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag_and_handlers_come_back(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capsys.readouterr().err


def test_the_second_signal_kills_at_once() -> None:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_the_commit_is_a_hash_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", commit())
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "distill" / "tracking.py"))
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert commit() == "unknown"


def test_hardware_names_cores_their_arithmetic_and_threads() -> None:
    told = hardware(torch.device("cpu"))  # such as 2 CPU cores (x86_64, AVX512, AMX), 1 thread
    assert re.fullmatch(r"\d+ CPU cores \(\w+, [\w ]+(, AMX)?\), \d+ threads?", told)
