"""The clean stop."""

from __future__ import annotations

import os
import signal

import pytest

from distill.stopping import stop_on_signals


def test_stops_within_each_other_are_one() -> None:
    with stop_on_signals() as outer:
        with stop_on_signals() as first:
            os.kill(os.getpid(), signal.SIGTERM)
        with stop_on_signals() as second:
            assert [bool(stop) for stop in (outer, first, second)] == [True] * 3
    with stop_on_signals() as later:
        assert not later


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
