"""The progress display of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """A live bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        label: What is being done.
        total: Number of steps.
        start: Steps done before.
        show: False on all processes but the first.
        last: Whether to print a plain line for the last step, however soon it comes.
    """

    PLAIN_SECONDS = 10.0

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        show: bool = True,
        stream: TextIO | None = None,
        last: bool = True,
    ) -> None:
        self._stream = stream or sys.stderr
        self._last = last
        self._label, self._show, self._total, self._done = label, show, total, start
        self._bar = tqdm(
            total=total, initial=start, desc=label, unit="step", file=self._stream,
            dynamic_ncols=True, leave=last, disable=not (show and self._stream.isatty()),
        )  # fmt: skip
        self._began = self._printed = time.monotonic()
        self._start, self._count, self._waited = start, 0, 0.0

    def update(self, count: int, values: Mapping[str, float], waited: float = 0.0) -> None:
        """Report that one step is done.

        Args:
            count: Images in it.
            values: Figures to show.
            waited: Seconds of it spent waiting for data.
        """
        self._done += 1
        self._count += count
        self._waited += waited
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        shown = [f"{self._count / seconds:.0f} images/s"]
        shown += [f"{name} {value:.3f}" for name, value in values.items()]
        if self._waited / seconds >= 0.05:
            shown.append(f"waiting for data {self._waited / seconds:.0%}")
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update()
        elif self._show and (
            now - self._printed >= self.PLAIN_SECONDS or (self._last and self._done == self._total)
        ):
            left = (self._total - self._done) * seconds / (self._done - self._start)
            shown.append(f"ETA {tqdm.format_interval(left)}")
            print(
                f"{self._label} {self._done}/{self._total}: {', '.join(shown)}",
                file=self._stream, flush=True,
            )  # fmt: skip
            self._printed = now

    @property
    def rate(self) -> float:
        """Images per second since the start."""
        return self._count / max(time.monotonic() - self._began, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
