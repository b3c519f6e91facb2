"""The progress display."""

from __future__ import annotations

import io
import re
import time

import pytest

from distill.progress import Progress


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
