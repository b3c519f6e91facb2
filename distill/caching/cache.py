"""The teacher's features, computed once: a folder with one row for each (image, flip, timestep).

`manifest.json` says what the features are of, `features.bin` holds the rows (the layers' maps one
after the other, in the precision that the teacher computes in, and their CRC-32), and `marks.bin` a
uint32 per row: 0 while it is missing, otherwise the checksum of the image it is of. Rows are read
and written, not mapped: the pages of a map would count as memory of this process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import checkpoint, seeding
from distill.errors import UserError, blame
from distill.matching.projectors import resize_map
from teachers.protocol import Teacher

BLOCK = 256
"""Number of rows between two syncs to the disk: the most that a crash can lose."""
ALIGNMENT = 64
CHECKSUM = 4
"""Bytes at the end of a row: in the row, so that one of several writers cannot contradict it."""
CHUNK = "images at once"
"""Key of the manifest, needed because kernels round differently for every number of images."""


class Stored(NamedTuple):
    """Shape and dtype in which a layer's map is stored; (C, 1, 1) if only its average is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of one map in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Plan(NamedTuple):
    """The content of a full cache."""

    images: int
    flips: int
    """2 if images also come flipped, otherwise 1."""
    bins: int
    layers: Mapping[str, Stored]

    @property
    def rows(self) -> int:
        """Number of features per layer."""
        return self.images * self.flips * self.bins

    @property
    def columns(self) -> dict[str, slice]:
        """The bytes of each layer in a row."""
        columns, start = {}, 0
        for layer, stored in self.layers.items():
            columns[layer] = slice(start, start + stored.bytes)
            start += _aligned(stored.bytes)
        return columns

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes: all layers, and the checksum."""
        return sum(_aligned(stored.bytes) for stored in self.layers.values()) + CHECKSUM

    @property
    def gb(self) -> float:
        """Size on the disk in GB."""
        return self.rows * (self.row_bytes + 4) / 1e9

    def __str__(self) -> str:
        dtypes = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in self.layers.values())
        counts = f"{self.images} images x {self.flips} flips x {self.bins} bins"
        return f"{counts} x {len(self.layers)} layers, {' and '.join(dtypes)}: {self.gb:.3g} GB"


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


class FeatureCache:
    """A teacher that stores its features.

    The features of an image, flip and timestep are a function of these alone: their noise has a
    seed of its own, whatever the run's seed is, and the teacher computes them in batches of one
    size, because float32 kernels round differently for every size. So it does not matter when, in
    which order and by whom the cache is filled. Several processes may share a folder: what two of
    them write twice is the same.

    Args:
        folder: Made if it is missing.
        teacher: Asked for what is missing.
        plan: What the cache is to hold.
        examples: (N,) int64, ascending: the numbers of the images in the data set.
        timesteps: (K,) int64, what the bins stand for.
        origin: All that decides the features, in readable form.
        chunk: Images that the teacher looks at together in a new folder.

    Attributes:
        chunk: Images per look in this folder, which keeps the number it was made with.
        teacher_images: How many images the teacher has looked at so far, those that filled a chunk
            too.

    Raises:
        UserError: The folder holds other features than these, is damaged, or cannot be made as
            large as planned.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        plan: Plan,
        *,
        examples: NDArray[np.int64],
        timesteps: Tensor,
        origin: Mapping[str, Any],
        chunk: int,
    ) -> None:
        self.folder, self.teacher, self.plan = folder, teacher, plan
        self._examples, self._timesteps = examples, timesteps
        with blame("teacher.cache"):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone_in(folder):
                if (kept := check_origin(folder, origin)) is None:
                    kept = {**origin, CHUNK: chunk}
                    _make(folder, plan, kept)
            try:
                self._file = os.open(folder / "features.bin", os.O_RDWR)
                weakref.finalize(self, os.close, self._file)
                sizes = os.fstat(self._file).st_size, (folder / "marks.bin").stat().st_size
            except FileNotFoundError:
                raise self._damaged() from None
        begun_with = kept.get(CHUNK)
        whole = sizes[0] >= plan.rows * plan.row_bytes and sizes[1] == plan.rows * 4
        if not whole or not isinstance(begun_with, int) or begun_with < 1:
            raise self._damaged()
        self.chunk = begun_with
        self._saved = np.memmap(folder / "marks.bin", np.uint32, "r+")
        self._marks = np.array(self._saved)  # ours may be ahead of what is safe on the disk
        self._unsaved: list[NDArray[np.int64]] = []
        self.teacher_images = 0

    def __str__(self) -> str:
        return f"cache of {self.plan} in {self.folder}, {len(self) / self.plan.rows:.0%} filled"

    def __len__(self) -> int:
        """Number of filled rows."""
        return int(np.count_nonzero(self._marks))

    def features(self, images: Tensor, tags: Tensor, bins: Tensor) -> dict[str, Tensor]:
        """As `Teacher.features` gives them, from the disk; what is missing is computed first.

        Args:
            images: (B, 3, H, W) in [0, 1], on the teacher's device.
            tags: (B, 3) int64 on the CPU, see `data.Tagged`.
            bins: (B,) int64 on the CPU, their timesteps.

        Raises:
            UserError: An image is not the one that its row was filled with, a row is not as it was
                written, or the disk fails.
        """
        missing = self.missing(tags, bins)
        if len(missing):
            self.fill(images[missing], tags[missing], bins[missing])
        rows = self._rows(tags, bins)
        read = np.empty((len(rows), self.plan.row_bytes), np.uint8)
        with blame("teacher.cache"):
            for row, out in zip(rows.tolist(), read, strict=True):
                whole = os.preadv(self._file, [out.data], row * out.nbytes) == out.nbytes
                if not whole or not np.array_equal(out[-CHECKSUM:], _checksum(out)):
                    raise self._damaged()
        moved = torch.from_numpy(read).to(images.device)
        maps = {}
        for layer, columns in self.plan.columns.items():
            stored = self.plan.layers[layer]
            maps[layer] = moved[:, columns].view(stored.dtype).reshape(-1, *stored.shape).float()
        return maps

    def missing(self, tags: Tensor, bins: Tensor) -> Tensor:
        """Places (M,) int64 of the rows to compute, ascending; the first of equal rows.

        Raises:
            UserError: As `features`.
        """
        rows = self._rows(tags, bins)
        marks = self._marks[rows]
        stale = (marks != 0) & (marks != tags[:, 2].numpy())
        if stale.any():
            example = int(tags[int(stale.argmax()), 0])
            raise UserError(
                f"teacher.cache: training image {example} is not the one whose features are in "
                f"{self.folder}; delete that folder, or choose another"
            )
        empty = np.flatnonzero(marks == 0)
        first = np.unique(rows[empty], return_index=True)[1]
        return torch.from_numpy(empty[np.sort(first)])

    def fill(self, images: Tensor, tags: Tensor, bins: Tensor) -> None:
        """Compute rows that are missing; arguments as `features`."""
        for start in range(0, len(images), self.chunk):
            part = slice(start, start + self.chunk)
            self._compute(images[part], tags[part], bins[part])

    def flush(self) -> None:
        """Mark what was computed, once it is safe on the disk; learn what others have filled."""
        if not self._unsaved:
            return
        rows, self._unsaved = np.concatenate(self._unsaved), []
        with blame("teacher.cache"):
            os.fsync(self._file)
            self._saved[rows] = self._marks[rows]
            self._saved.flush()
        self._marks[:] = self._saved

    def _rows(self, tags: Tensor, bins: Tensor) -> NDArray[np.int64]:
        example = np.searchsorted(self._examples, tags[:, 0].numpy())
        rows: NDArray[np.int64] = example * self.plan.flips + tags[:, 1].numpy()
        rows = rows * self.plan.bins + bins.numpy()
        return rows

    def _compute(self, images: Tensor, tags: Tensor, bins: Tensor) -> None:
        """At most a chunk of rows; the teacher sees a whole one, whatever their number is."""
        count = len(images)
        padded = torch.arange(self.chunk) % count
        timesteps = self._timesteps[bins][padded]
        noise = [
            seeding.generator(0, "cache", example, 2 * t + flipped)
            for (example, flipped, _), t in zip(
                tags[padded].tolist(), timesteps.tolist(), strict=True
            )
        ]
        maps = self.teacher.features(images[padded].contiguous(), timesteps, noise)
        self.teacher_images += self.chunk
        written = torch.zeros(count, self.plan.row_bytes, dtype=torch.uint8)
        for layer, columns in self.plan.columns.items():
            stored, feature = self.plan.layers[layer], maps[layer][:count]
            if not bool(feature.isfinite().all()):
                raise UserError(
                    f"teacher.cache: a feature of layer {layer!r} is not finite; try "
                    "teacher.dtype=bfloat16, or float32"
                )
            feature = resize_map(feature, (stored.shape[1], stored.shape[2]))
            flat = feature.to("cpu", stored.dtype).flatten(1).contiguous()
            written[:, columns] = flat.view(torch.uint8)
        rows = self._rows(tags, bins)
        with blame("teacher.cache"):
            for row, data in zip(rows.tolist(), written.numpy(), strict=True):
                data[-CHECKSUM:] = _checksum(data)
                if os.pwrite(self._file, data, row * data.nbytes) != data.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        self._marks[rows] = tags[:, 2].numpy()
        self._unsaved.append(rows)
        if sum(map(len, self._unsaved)) >= BLOCK:
            self.flush()

    def _damaged(self) -> UserError:
        return UserError(f"teacher.cache: {self.folder} is damaged; delete it")


def _checksum(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes at the end of a row that go with those before them."""
    crc = zlib.crc32(row[:-CHECKSUM].data)
    return np.frombuffer(crc.to_bytes(CHECKSUM, "little"), np.uint8)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others who open the cache waiting: of several that start at once, one makes it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks lock no folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _make(folder: Path, plan: Plan, origin: Mapping[str, Any]) -> None:
    """Reserve the disk for all rows, none of them filled."""
    features = folder / "features.bin"
    file = os.open(features, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, plan.rows * plan.row_bytes)
        else:  # macOS: a full disk shows when it is written to
            os.ftruncate(file, plan.rows * plan.row_bytes)
    except OSError as error:
        features.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"teacher.cache: {plan}, but {folder} has only {free:.3g} GB free; choose a folder on "
            "another disk, or lower teacher.cache_gb to be told what fits"
        ) from error
    finally:
        os.close(file)
    with checkpoint.replacing(folder / "marks.bin") as marks:
        marks.write(bytes(4 * plan.rows))
    checkpoint.write_text(folder / "manifest.json", json.dumps(origin, indent=2, default=str))


def check_origin(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's manifest, None where there is none yet.

    Raises:
        UserError: Its features are of something else.
    """
    now = json.loads(json.dumps(origin, default=str))
    if not (folder / "manifest.json").exists():
        return None
    try:
        was: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        differing = [key for key in now if was.get(key) != now[key]]
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"teacher.cache: {folder / 'manifest.json'} is not a cache manifest; choose another "
            "folder"
        ) from error
    if differing:
        changes = [change for key in differing for change in _changes(key, was.get(key), now[key])]
        raise UserError(
            f"teacher.cache: {folder} has other features ({'; '.join(changes)}); delete it, or "
            "choose another folder"
        )
    return was


def _changes(key: str, was: Any, now: Any) -> list[str]:
    """What differs, down to the parts of mappings."""
    if isinstance(was, dict) and isinstance(now, dict):
        parts = {f"{key}.{part}": (was.get(part), now.get(part)) for part in was | now}
        return [x for part, of in parts.items() if of[0] != of[1] for x in _changes(part, *of)]
    return [f"{key} {_short(was)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
