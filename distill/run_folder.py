"""A run's folder and its log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

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
