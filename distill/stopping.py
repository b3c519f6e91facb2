"""A clean stop: the first Ctrl-C ends long work after its step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator


class StopSignal:
    """True once the user asked to stop."""

    def __init__(self, set: bool = False) -> None:
        self.set = set

    def __bool__(self) -> bool:
        return self.set


_STOPS: list[StopSignal] = []


def stop_of_any(stop: StopSignal, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop, as all must stop at the same step."""
    if accelerator.num_processes == 1:
        return bool(stop)
    asked = torch.tensor([float(bool(stop))], device=accelerator.device)
    return bool(accelerator.gather(asked).any())


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Turn the first Ctrl-C (or SIGTERM) into a flag to check between steps; the second kills.

    If nested, all flags are set, including those that begin later.
    """
    stop, mine = StopSignal(any(_STOPS)), os.getpid()
    _STOPS.append(stop)

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a process that reads data: it ends with this one
            return
        if stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for one in _STOPS:
            one.set = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr, flush=True)

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        _STOPS.remove(stop)
        for number, handler in previous.items():
            signal.signal(number, handler)
