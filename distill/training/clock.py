"""Where a step's time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Timed = Callable[[str], AbstractContextManager[None]]
"""`with timed("teacher"): ...`"""


def untimed(part: str) -> AbstractContextManager[None]:
    """Takes no time."""
    return nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Adds up the seconds of a program's parts; those of a part inside another count for it alone.

    On a GPU it waits at every border, so that what runs there counts for the part that asked.

    Attributes:
        seconds: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._lap()
        self._running.append(part)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
