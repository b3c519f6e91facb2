"""Feedback on long work: the run folder's log, the progress display, a clean stop."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from distill.checkpoint import remove_leftovers, write_text
from distill.errors import UserError


def open_run_folder(folder: Path, resume: bool, other: str = "name=") -> None:
    """Make the folder of a new run, or check the one to resume. Raises UserError if it cannot.

    Args:
        other: The option that chooses another folder.
    """
    if resume and not folder.is_dir():
        raise UserError(f"there is no run {folder} to resume; start it without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot create run folder {folder}: {error.strerror}") from error
    if resume:
        remove_leftovers(folder)
    if not resume and not empty:
        raise UserError(
            f"run folder {folder} exists; continue with --resume, or choose another {other}"
        )


def remove_if_bare(folder: Path) -> None:
    """Remove a run that failed before its first row of figures, so that its name is free again."""
    checkpoints = any(path.is_file() for path in (folder / "checkpoints").rglob("*"))
    if not checkpoints and not read_metrics(folder):
        shutil.rmtree(folder)


class RunLog:
    """metrics.jsonl and TensorBoard events of one run folder.

    Args:
        folder: The run folder.
        arm: Name of what is trained, written in every row.
        start: The step that training continues from. Later rows of this arm, left by a killed run,
            are dropped: the resumed run writes them again.
    """

    def __init__(self, folder: Path, arm: str, start: int = 0) -> None:
        self._path = folder / "metrics.jsonl"
        self._arm = arm
        kept = [r for r in read_metrics(folder) if r["arm"] != arm or r["step"] <= start]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.events = SummaryWriter(str(folder / "tensorboard" / arm), purge_step=start or None)

    def scalars(self, step: int, values: Mapping[str, float], **lists: Sequence[float]) -> None:
        """Write one row, and its figures (without the lists) to TensorBoard."""
        row = {"arm": self._arm, "step": step, **values, **lists}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def distribution(self, step: int, name: str, values: Tensor) -> None:
        """Write a histogram of chosen timesteps to TensorBoard."""
        self.events.add_histogram(name, values, step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Write images (N, 3, H, W) in [0, 1] to TensorBoard."""
        self.events.add_images(name, images, step)

    def close(self) -> None:
        """Close both files; nothing can be written afterwards."""
        self.events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that a crash cut off.

    Raises:
        UserError: Another line is damaged.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is damaged; restore the file from a backup, or remove "
                    "the line"
                ) from error
    return rows


def _row(content: Any) -> dict[str, Any]:
    """Check a row of the log. Raises ValueError, TypeError or KeyError if it is invalid."""
    row = {"arm": content["arm"], "step": content["step"], **content}
    kinds = {"arm": str, "step": int, "probabilities": list}
    for name, value in row.items():
        entries = value if isinstance(value, list) else [value]
        if not isinstance(value, kinds.get(name, object)) or (
            name != "arm" and not all(isinstance(x, int | float | None) for x in entries)
        ):
            raise ValueError(f"{name} is {value!r}")
    return row


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


def commit() -> str:
    """Commit of the program's checkout, with `+` if changed; `unknown` if there is none."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        changes = ["status", "--porcelain", "--untracked-files=no"]
        status = subprocess.run([*git, *changes], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def hardware(device: torch.device) -> str:
    """The machine in words, to accompany a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch
    if capabilities is not None and capabilities().get("amx_bf16"):
        kind.append("AMX")
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores ({', '.join(kind)}), {threads} thread{'s'[: threads - 1]}"


def memory(device: torch.device) -> dict[str, float]:
    """GiB of this process's resident memory, and on a GPU the most that torch held so far."""
    figures = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        figures["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures
