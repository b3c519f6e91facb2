"""`images`: any folder of images, without labels, to train a teacher on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours, notice
from distill.benchmarks.files import (
    EIGHT_BIT_MODES,
    IMAGE_SUFFIXES,
    UNREADABLE,
    images_below,
    is_cut,
    read_image,
)
from distill.errors import UserError, one_line

SKIP = 0.01
"""Share of the images without labels that may be unreadable."""


class UnlabelledImages(Dataset[tuple[Tensor, int]]):
    """Image files, decoded when asked for, upright. Items: image (3, H, W) uint8, `IGNORE_INDEX`.

    Args:
        root: The folder that `names` are relative to.
        paths: The files.
        skip: Largest share of them that may be unreadable, over all worker processes of a loader;
            each is named. In the place of such a file comes the next one that can be read, so that
            what an index gives depends on the files alone.

    Raises:
        UserError: `skip` is not from 0 to below 1.
    """

    def __init__(self, root: Path, paths: Sequence[Path], skip: float = SKIP) -> None:
        if not 0 <= skip < 1:
            raise UserError(
                f"data.options.skip: must be a share of the files, 0 to below 1, got {skip}"
            )
        self.paths, self.skip = paths, int(skip * len(paths))
        # A folder that a recipe names may also lie outside the root.
        self.names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
        # Worker processes write to one memory, and so count together.
        self._unreadable = torch.zeros(len(paths), dtype=torch.bool)
        self._unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        while True:
            if not self._unreadable[index]:
                try:
                    return read_image(self.paths[index], upright=True), IGNORE_INDEX
                except UserError as error:
                    self._leave_out({index: str(error)})
            index = (index + 1) % len(self)

    @property
    def unreadable(self) -> frozenset[int]:
        """The indices of the files that could not be read so far."""
        return frozenset(self._unreadable.nonzero().flatten().tolist())

    def check_headers(self) -> None:
        """Leave out files that are not images by their first bytes; nothing is decoded. Raises
        UserError."""
        problems = {index: _header_problem(path) for index, path in enumerate(self.paths)}
        self._leave_out({index: text for index, text in problems.items() if text})

    def _leave_out(self, problems: Mapping[int, str]) -> None:
        """Say what is wrong with the files at some indices, and remember it."""
        bad = sorted({*problems, *self._unreadable.nonzero().flatten().tolist()})
        if len(bad) > self.skip:
            first = ", ".join(self.names[index] for index in bad[:3])
            raise UserError(
                f"{next(iter(problems.values()))}; {len(bad)} of {len(self)} images are unreadable "
                f"({first}{', ...' if len(bad) > 3 else ''}), but at most {self.skip} may be: fix "
                "or remove them before training begins, or raise data.options.skip"
            )
        for problem in problems.values():
            notice(f"skipped {problem}")
        self._unreadable[list(problems)] = True


def _header_problem(path: Path) -> str:
    """The fault that a file's first bytes show; empty if there is none."""
    try:
        with Image.open(path) as image:
            mode, deep = image.mode, is_cut(image)
    except UNREADABLE as error:
        return f"{path}: cannot be decoded ({one_line(error)})"
    if deep:
        return f"{path}: has 16-bit colours"
    return "" if mode in EIGHT_BIT_MODES else f"{path}: {mode!r} is not an 8-bit image"


class Images:
    """All images below a folder, however deep, in the order of their paths. One split: train.

    Args:
        root: The folder. Files and folders that begin with a dot are left out.
        skip: Largest share of the files that may be unreadable; each is named. More of them stop
            the run, at its start (no image, more than 8 bits) or when one turns out damaged.
    """

    name = "images"
    task: Task | None = None
    class_names: tuple[str, ...] = ()
    num_classes = 0
    ignore_index = IGNORE_INDEX
    palette = distinct_colours(0)

    def __init__(self, root: str | None, *, skip: float = SKIP) -> None:
        if root is None:
            raise UserError("images: no folder given; set data.root=FOLDER")
        folder = Path(root)
        if not folder.is_dir():
            raise UserError(f"images: there is no folder {folder}; set data.root=FOLDER")
        paths = images_below(folder)
        if not paths:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"images: no image file below {folder} (looked for {known})")
        self._examples = UnlabelledImages(folder, paths, skip)
        self._examples.check_headers()

    def dataset(self, split: str) -> UnlabelledImages:
        """The images; the only split is `train`."""
        if split != "train":
            raise UserError(
                f"images has no split {split!r}: its images have no labels and are for train only"
            )
        return self._examples
