"""Time of a step by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Timed = Callable[[str], AbstractContextManager[None]]
"""Measures the time of a part: `with timed("teacher"): ...`."""


def untimed(part: str) -> AbstractContextManager[None]:
    """A `Timed` that measures nothing."""
    return nullcontext()


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Adds up the seconds of a program's parts; nested parts count only for the inner one.

    It waits for a GPU at every border, so that its work counts for the part that started it.

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
